// Pillow's antialiased resampling of uint8 RGB, bit for bit, for any rectangle of the resized canvas. Knows no tiles.
#pragma once

#include <cstdint>

namespace rsvlm {

enum class Resample { bilinear, bicubic, lanczos };

// A uint8 RGB image whose pixels are contiguous inside a row.
struct ImageView {
    const std::uint8_t* pixels;
    std::int64_t height;
    std::int64_t width;
    std::int64_t row_stride;  // bytes
};

// A rectangle [y0, y1) x [x0, x1) of the canvas, in pixels.
struct Rectangle {
    std::int64_t y0, x0, y1, x1;
};

// Writes `part` of `image` resized to canvas_height x canvas_width into `out` (row stride in bytes).
// The first pass rounds to 8 bits like Pillow does, so the order of the passes matters: `vertical_first` names it.
// `part` must be non-empty and inside the canvas; the caller checks.
void resample_part(const ImageView& image, std::int64_t canvas_height, std::int64_t canvas_width, const Rectangle& part,
                   Resample filter, bool vertical_first, std::uint8_t* out, std::int64_t out_row_stride);

}  // namespace rsvlm
