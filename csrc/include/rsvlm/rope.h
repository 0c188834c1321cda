// The native twin of rsvlm_infer.ops.rope: rotation of the pairs (i, i + head_dim / 2). Knows no Python and no frequencies.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"

namespace rsvlm {

// x [tokens, heads, head_dim] with contiguous heads and the given stride between tokens; cosines and sines float32
// [tokens, head_dim / 2] -> out [tokens, heads, head_dim], contiguous.
void rope(const void* x, std::int64_t token_stride, const float* cosines, const float* sines, std::int64_t tokens,
          std::int64_t heads, std::int64_t head_dim, Element element, void* out);

}  // namespace rsvlm
