// The native twin of rsvlm_infer.ops.varlen_tile_attention: attention inside each tile of a packed sequence. Knows no Python.
#pragma once

#include <cstdint>
#include <vector>

#include "rsvlm/element.h"

namespace rsvlm {

// A [rows, heads, head_dim] array whose head_dim is contiguous; strides in elements.
struct HeadRows {
    const void* data;
    std::int64_t row_stride;
    std::int64_t head_stride;
};

struct TileAttention {
    HeadRows q;
    HeadRows k;
    HeadRows v;
    void* out;  // [rows, heads, head_dim], contiguous
    std::int64_t heads;
    std::int64_t head_dim;
    Element element;
    float scale;
    int threads = 0;  // at most; 0 = as many as the work deserves
};

// bounds and key_bounds: T + 1 exclusive prefix sums each. Every row of `out` inside the bounds is written.
// Throws std::invalid_argument when bounds do not rise from 0, differ in length, or heads or head_dim are out of range.
void varlen_tile_attention(const TileAttention& call, const std::vector<std::int64_t>& bounds,
                           const std::vector<std::int64_t>& key_bounds);

}  // namespace rsvlm
