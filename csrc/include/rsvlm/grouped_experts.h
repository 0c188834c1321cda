// The native twin of rsvlm_infer.ops.grouped_experts: the experts' feed-forward over routed tokens. Knows no Python, no router.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"

namespace rsvlm {

// All contiguous. x, out and the experts' weights have `element`; weights of slots are float32.
struct GroupedExperts {
    const void* x;                       // [tokens, width]
    const std::int32_t* expert_offsets;  // [experts + 1]
    const std::int32_t* permutation;     // [tokens * k]
    const float* weights;                // [tokens, k]
    const void* w_gate;                  // [experts, hidden, width]; null = no gate
    const void* w_up;                    // [experts, hidden, width]; null = affine, then hidden = width
    const void* w_down;                  // [experts, width, hidden]
    const void* b_up;                    // [experts, hidden] or null
    const void* b_down;                  // [experts, width] or null
    void* out;                           // [tokens, width], every element written
    std::int64_t tokens, width, hidden, experts, k;
    Element element;
};

// Slots are summed in fp32 in slot order; a token's bits depend on no other token.
// Throws std::invalid_argument when offsets do not rise from 0 to at most tokens * k, or the permutation leaves that range.
void grouped_experts(const GroupedExperts& call);

}  // namespace rsvlm
