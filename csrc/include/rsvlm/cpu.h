// What this build can use of the CPU. Knows no op.
#pragma once

#include <cstddef>
#include <string>

// RSVLM_MULTIVERSION compiles a function once per instruction set and picks the best at load time, so that one binary
// is fast on a new CPU and runs on an old one. It needs ifunc support, which glibc on x86-64 has. GCC only: clang
// rejects the attribute on some of our templates and vectorises the plain version well enough.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RSVLM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RSVLM_MULTIVERSION
#endif

// Kernels written with intrinsics live in one file per instruction set (<op>_avx2.cpp, ...), each under a target pragma, and
// are chosen at run time by kernel_isa(). GCC only: clang has no file-wide form of that pragma, so it runs the portable
// kernels.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RSVLM_X86_KERNELS 1
#else
#define RSVLM_X86_KERNELS 0
#endif

namespace rsvlm {

// The instruction sets that kernels are written for; each one includes those before it. kAvx512Bf16 has the dot products of
// bf16 and of bytes (VNNI), and permutations of bytes (VBMI).
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best that this machine and this build have, or less when limit_isa() asked for less.
Isa kernel_isa();

// "portable", "avx2", "avx512" or "avx512_bf16".
std::string isa_name(Isa isa);

// Holds all kernels of this process to one instruction set; "auto" takes the best again. For tests and measurements.
// Throws std::invalid_argument for an unknown name or one that this machine does not have.
void limit_isa(const std::string& name);

// "avx512", "avx2" or "baseline": the version that RSVLM_MULTIVERSION functions run with here.
std::string isa();

// True when the library was compiled with OpenMP.
bool has_openmp();

// Threads that a parallel region would use now; 1 without OpenMP.
int num_threads();

// Asks the system for huge pages (2 MiB) inside of this memory, before it is first written; where there are none, nothing
// happens.
void ask_for_huge_pages(void* memory, std::size_t bytes);

}  // namespace rsvlm
