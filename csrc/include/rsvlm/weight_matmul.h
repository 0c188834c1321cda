// The native twin of rsvlm_infer.ops.weight_matmul: few rows times a weight of few bits, at the speed of reading the weight.
// Knows no Python.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"

namespace rsvlm {

enum class WeightKind { kBf16, kInt8, kInt4 };

struct WeightShape {
    WeightKind kind;
    std::int64_t rows;     // Out
    std::int64_t columns;  // In; a multiple of 32 unless bf16
    bool wide_scales;      // float32 instead of float16
};

// Bytes of the layout that `weight_matmul` reads. Throws std::invalid_argument for a shape it cannot hold.
std::int64_t weight_layout_bytes(const WeightShape& shape);

// codes and scales as PackedWeight of the eager op holds them (scales null for bf16) -> layout, every byte written.
void lay_out_weight(const WeightShape& shape, const void* codes, const void* scales, void* layout);

// x [tokens, columns] times the weight -> out [tokens, rows], both contiguous and of `element`; sums in fp32. A row's bits
// depend on no other row. Meant for up to 8 rows: each further 8 read the weight again.
void weight_matmul(const WeightShape& shape, const void* layout, const void* x, std::int64_t tokens, Element element,
                   void* out);

}  // namespace rsvlm
