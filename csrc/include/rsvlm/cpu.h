// What this build can use of the CPU. Knows no op.
#pragma once

#include <string>

// RSVLM_MULTIVERSION compiles a function once per instruction set and picks the best at load time, so that one binary
// is fast on a new CPU and runs on an old one. It needs ifunc support, which glibc on x86-64 has. GCC only: clang
// rejects the attribute on some of our templates and vectorises the plain version well enough.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RSVLM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RSVLM_MULTIVERSION
#endif

namespace rsvlm {

// "avx512", "avx2" or "baseline": the version that RSVLM_MULTIVERSION functions run with here.
std::string isa();

// True when the library was compiled with OpenMP.
bool has_openmp();

// Threads that a parallel region would use now; 1 without OpenMP.
int num_threads();

}  // namespace rsvlm
