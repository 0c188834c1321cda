// The native twin of rsvlm_infer.ops.pack_tiles: resample + crop + normalise + patchify. Knows no Python and no plan.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "rsvlm/resample.h"

namespace rsvlm {

// One tile: `image` is resized to the canvas; the crop of (grid_height, grid_width) patches at (crop_y, crop_x) is taken,
// which may reach beyond the canvas.
struct Tile {
    ImageView image;
    std::int64_t canvas_height, canvas_width;
    std::int64_t crop_y, crop_x;
    std::int64_t grid_height, grid_width;
    bool vertical_first;
};

struct PackOptions {
    std::int64_t patch;  // pixels
    std::array<float, 3> mean;
    std::array<float, 3> std;
    Resample filter;
    std::array<std::uint8_t, 3> fill;
};

// Number of patches of all tiles. Throws std::invalid_argument for an impossible tile, naming it.
std::int64_t count_patches(const std::vector<Tile>& tiles, const PackOptions& options);

// -> patches float [count_patches, 3 * patch * patch], every element written.
void pack_tiles(const std::vector<Tile>& tiles, const PackOptions& options, float* patches);

}  // namespace rsvlm
