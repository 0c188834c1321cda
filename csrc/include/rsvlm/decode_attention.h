// The native twin of rsvlm_infer.ops.decode_attention: new tokens over a KV cache with grouped query heads. Knows no Python.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"

namespace rsvlm {

// A [batch, rows, heads, head_dim] array whose head_dim is contiguous; strides in elements.
struct BatchRows {
    const void* data;
    std::int64_t batch_stride, row_stride, head_stride;
};

struct DecodeAttention {
    BatchRows q;                    // [batch, tokens, heads, head_dim]
    BatchRows k, v;                 // [batch, capacity, kv_heads, head_dim]
    const std::int64_t* positions;  // [batch, tokens] contiguous
    const bool* mask;               // [batch, tokens, capacity] contiguous, or null = causal by positions
    void* out;                      // [batch, tokens, heads, head_dim], contiguous
    std::int64_t batch, tokens, heads, kv_heads, capacity, head_dim;
    Element element;
};

// Throws std::invalid_argument when heads do not divide by kv_heads or a position is not in 0..capacity - 1.
void decode_attention(const DecodeAttention& call);

}  // namespace rsvlm
