// The native twin of rsvlm_infer.ops.complexity_map: integral images of a grey overview. Knows no Python.
#pragma once

#include <cstdint>

namespace rsvlm {

constexpr int kComplexityBins = 16;
constexpr int kComplexityChannels = 4 + kComplexityBins;

// gray uint8 [height, width] and mask (0 or 1) of the same shape, both C-contiguous
// -> tables double [20, height + 1, width + 1], every element written.
// Throws std::invalid_argument when a side is below 1.
void complexity_map(const std::uint8_t* gray, const std::uint8_t* mask, std::int64_t height, std::int64_t width,
                    double* tables);

}  // namespace rsvlm
