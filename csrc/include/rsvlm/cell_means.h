// The native twin of rsvlm_infer.ops.cell_means: means over square cells of pixels. Knows no Python and no raster.
#pragma once

#include <cstdint>

namespace rsvlm {

constexpr std::int64_t kLargestFactor = 1 << 15;  // sums of so many rows of 2-byte integers fit 32 bits

// What a pixel is made of.
enum class Pixel { kUint8, kInt8, kUint16, kInt16, kUint32, kInt32, kUint64, kInt64, kFloat32, kFloat64 };

// Cells of `bands` bands; rows are contiguous, strides are in elements.
struct CellMeans {
    Pixel pixel;
    const void* values;         // [bands, height, width], C-contiguous
    const std::uint8_t* valid;  // 0 or 1 [valid_bands, height, width], C-contiguous; null where all are valid
    std::int64_t valid_bands;   // `bands`, or 1 for one mask that all share
    const void* nodata;         // one pixel [bands] for each band of integers, null where no value says that it is none
    std::int64_t bands, height, width, factor;
    void* means;  // rows of ceil(width / factor) pixels
    std::int64_t means_band_stride, means_row_stride;
    std::uint8_t* found;  // rows of ceil(width / factor) flags, 0 or 1
    std::int64_t found_band_stride, found_row_stride;
};

// Writes every cell; runs on the calling thread alone.
// Throws std::invalid_argument when a side is below 1, factor no power of two in 1..kLargestFactor, or floats have a nodata
// value.
void cell_means(const CellMeans& call);

}  // namespace rsvlm
