#include "rsvlm/cpu.h"

#include <atomic>
#include <stdexcept>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>

#include <cstdint>
#endif

namespace rsvlm {
namespace {

constexpr Isa kAll[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

Isa best_isa() {
#if RSVLM_X86_KERNELS
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return Isa::kPortable;
    }
    for (const bool has : {__builtin_cpu_supports("avx512f") != 0, __builtin_cpu_supports("avx512bw") != 0,
                           __builtin_cpu_supports("avx512dq") != 0, __builtin_cpu_supports("avx512vl") != 0}) {
        if (!has) {
            return Isa::kAvx2;
        }
    }
    const bool dots = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    return dots && __builtin_cpu_supports("avx512vbmi") ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
    return Isa::kPortable;
#endif
}

std::atomic<Isa>& chosen_isa() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

Isa kernel_isa() { return chosen_isa().load(std::memory_order_relaxed); }

std::string isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx512Bf16:
            return "avx512_bf16";
        default:
            return "portable";
    }
}

void limit_isa(const std::string& name) {
    const Isa best = best_isa();
    if (name == "auto") {
        chosen_isa().store(best);
        return;
    }
    std::string available = "auto";
    for (const Isa isa : kAll) {
        if (isa <= best) {
            if (name == isa_name(isa)) {
                chosen_isa().store(isa);
                return;
            }
            available += ", " + isa_name(isa);
        }
    }
    throw std::invalid_argument("isa must be one of " + available + " on this machine, got '" + name + "'; choose one of them");
}

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

void ask_for_huge_pages(void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = 2 << 20;
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = (address + kHuge - 1) / kHuge * kHuge, stop = (address + bytes) / kHuge * kHuge;
    if (first < stop) {
        (void)madvise(reinterpret_cast<void*>(first), stop - first, MADV_HUGEPAGE);  // a refusal costs speed, nothing else
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace rsvlm
