#include "rsvlm/grouped_experts.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "grouped_experts_kernel.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"
#include "rsvlm/scratch.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kCombineTokens = 64;  // that one part of the last pass sums

struct Kernels {
    void (*part)(const ExpertPart&);
    void (*combine)(const void*, const float*, std::int64_t, std::int64_t, std::int64_t, void*);
};

template <class T>
T choose(bool bf16, T half, T single) {
    return bf16 ? half : single;
}

Kernels choose_kernels(Element element) {
    const bool bf16 = element == Element::kBfloat16;
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            return {choose(bf16, avx512_bf16::expert_part_bf16, avx512::expert_part_fp32),
                    choose(bf16, avx512_bf16::combine_slots_bf16, avx512::combine_slots_fp32)};
        case Isa::kAvx512:
            return {choose(bf16, avx512::expert_part_bf16, avx512::expert_part_fp32),
                    choose(bf16, avx512::combine_slots_bf16, avx512::combine_slots_fp32)};
        case Isa::kAvx2:
            return {choose(bf16, avx2::expert_part_bf16, avx2::expert_part_fp32),
                    choose(bf16, avx2::combine_slots_bf16, avx2::combine_slots_fp32)};
#endif
        default:
            return {choose(bf16, portable::expert_part_bf16, portable::expert_part_fp32),
                    choose(bf16, portable::combine_slots_bf16, portable::combine_slots_fp32)};
    }
}

struct Part {
    std::int64_t expert, first, count;
};

// Longest first; every expert's tokens in parts of one size but the last, so that a part's bits do not depend on the threads.
std::vector<Part> plan_parts(const GroupedExperts& call) {
    std::vector<Part> parts;
    for (std::int64_t expert = 0; expert < call.experts; ++expert) {
        for (std::int64_t first = call.expert_offsets[expert]; first < call.expert_offsets[expert + 1];
             first += kExpertTokens) {
            parts.push_back({expert, first, std::min<std::int64_t>(kExpertTokens, call.expert_offsets[expert + 1] - first)});
        }
    }
    std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.count > b.count; });
    return parts;
}

void check(const GroupedExperts& call) {
    const std::int64_t slots = call.tokens * call.k;
    if (call.experts < 1 || call.expert_offsets[0] != 0 || call.expert_offsets[call.experts] > slots ||
        !std::is_sorted(call.expert_offsets, call.expert_offsets + call.experts + 1)) {
        throw std::invalid_argument("expert_offsets must rise from 0 to at most tokens * k = " + std::to_string(slots) +
                                    "; pass what route returned");
    }
    for (std::int64_t i = 0; i < call.expert_offsets[call.experts]; ++i) {
        if (call.permutation[i] < 0 || call.permutation[i] >= slots) {
            throw std::invalid_argument("permutation must be in 0.." + std::to_string(slots - 1) + ", got " +
                                        std::to_string(call.permutation[i]) + "; pass what route returned");
        }
    }
}

}  // namespace

void grouped_experts(const GroupedExperts& call) {
    check(call);
    const std::int64_t slots = call.tokens * call.k;
    const std::int64_t size = call.element == Element::kBfloat16 ? 2 : 4;
    const std::vector<Part> parts = plan_parts(call);
    const Kernels kernels = choose_kernels(call.element);
    const std::int64_t matrices = call.w_up == nullptr ? 1 : call.w_gate == nullptr ? 2 : 3;
    const double products = static_cast<double>(slots) * static_cast<double>(call.width * call.hidden * matrices);
    const int threads = threads_for(products);
    const auto slots_bytes = static_cast<std::size_t>(slots * call.width * size);
    auto* results = static_cast<char*>(thread_scratch(slots_bytes, 1));
    if (call.expert_offsets[call.experts] < slots) {  // slots of no expert count as zero
        std::memset(results, 0, slots_bytes);
    }
    const auto at = [size](const void* base, std::int64_t elements) -> const void* {
        return base == nullptr ? nullptr : static_cast<const char*>(base) + elements * size;
    };
    const auto scratch_floats = static_cast<std::size_t>(expert_scratch_floats(call.width, call.hidden));
    for_each_part(static_cast<std::int64_t>(parts.size()), threads, scratch_floats, [&](std::int64_t i, float* scratch) {
        const Part& part = parts[static_cast<std::size_t>(i)];
        const std::int64_t matrix = part.expert * call.hidden * call.width;
        kernels.part({call.x, call.permutation + part.first, at(call.w_gate, matrix), at(call.w_up, matrix),
                      at(call.w_down, matrix), at(call.b_up, part.expert * call.hidden),
                      at(call.b_down, part.expert * call.width), results, part.count, call.k, call.width, call.hidden,
                      scratch});
    });
    const std::int64_t pieces = (call.tokens + kCombineTokens - 1) / kCombineTokens;
    for_each_part(pieces, threads, 0, [&](std::int64_t i, float*) {
        const std::int64_t first = i * kCombineTokens;
        kernels.combine(results + first * call.k * call.width * size, call.weights + first * call.k,
                        std::min(kCombineTokens, call.tokens - first), call.k, call.width,
                        static_cast<char*>(call.out) + first * call.width * size);
    });
}

}  // namespace rsvlm
