// The native twin of rsvlm_infer.ops.route: which experts each token uses. Knows no Python and no weights of experts.
#pragma once

#include <cstdint>
#include <vector>

namespace rsvlm {

struct RouteOutputs {
    std::int32_t* expert_offsets;  // [experts + 1]
    std::int32_t* permutation;     // [tokens * k]
    float* weights;                // [tokens, k]
};

// logits [tokens, experts] contiguous; level_offsets L + 1 prefix sums from 0 to tokens. Ties go to the lowest expert, and NaN
// ranks above all numbers, as it does for torch's sort. Throws std::invalid_argument when experts do not divide by levels, k is
// not in 1..experts / levels, or offsets do not fit.
void route(const float* logits, std::int64_t tokens, std::int64_t experts, const std::vector<std::int64_t>& level_offsets,
           std::int64_t k, const RouteOutputs& outputs);

}  // namespace rsvlm
