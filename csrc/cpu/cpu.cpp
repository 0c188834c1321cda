#include "rsvlm/cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rsvlm {

std::string isa() {
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
    if (__builtin_cpu_supports("x86-64-v4")) {
        return "avx512";
    }
    if (__builtin_cpu_supports("x86-64-v3")) {
        return "avx2";
    }
#endif
    return "baseline";
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

int num_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

}  // namespace rsvlm
