#include "rsvlm/pack_tiles.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "rsvlm/cpu.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kMaxSide = 1 << 24;
constexpr std::int64_t kParallelBytes = 1 << 20;  // the reason is in resample.cpp

using Table = std::array<std::array<float, 256>, 3>;

void require(bool condition, std::size_t tile, const std::string& expectation, std::int64_t value) {
    if (!condition) {
        throw std::invalid_argument("tile " + std::to_string(tile) + ": " + expectation + ", got " + std::to_string(value) +
                                    "; check the plan");
    }
}

// (x / 255 - mean) / std in float32, the rounding order of the eager definition.
Table make_table(const PackOptions& options) {
    Table table;
    for (std::size_t channel = 0; channel < 3; ++channel) {
        for (std::size_t level = 0; level < 256; ++level) {
            const float value = static_cast<float>(level) / 255.0f;
            table[channel][level] = (value - options.mean[channel]) / options.std[channel];
        }
    }
    return table;
}

// pixels uint8 [grid_height * patch, grid_width * patch, 3] -> out [grid_height * grid_width, 3, patch, patch]
void patchify(const std::vector<std::uint8_t>& pixels, const Tile& tile, std::int64_t patch, const Table& table, float* out) {
    const std::int64_t row_bytes = tile.grid_width * patch * 3;
    const std::int64_t area = patch * patch;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (tile.grid_height * patch * row_bytes > kParallelBytes)
#endif
    for (std::int64_t row = 0; row < tile.grid_height; ++row) {
        for (std::int64_t y = 0; y < patch; ++y) {
            const std::uint8_t* source = pixels.data() + (row * patch + y) * row_bytes;
            float* target = out + row * tile.grid_width * 3 * area + y * patch;
            for (std::int64_t column = 0; column < tile.grid_width; ++column, target += 3 * area) {
                for (std::int64_t x = 0; x < patch; ++x, source += 3) {
                    target[x] = table[0][source[0]];
                    target[area + x] = table[1][source[1]];
                    target[2 * area + x] = table[2][source[2]];
                }
            }
        }
    }
}

// The crop as uint8 [height, width, 3], `fill` outside the canvas.
void fill_crop(const Tile& tile, const PackOptions& options, std::vector<std::uint8_t>& pixels) {
    const std::int64_t height = tile.grid_height * options.patch;
    const std::int64_t width = tile.grid_width * options.patch;
    pixels.resize(static_cast<std::size_t>(height * width * 3));
    const Rectangle part{std::max<std::int64_t>(tile.crop_y, 0), std::max<std::int64_t>(tile.crop_x, 0),
                         std::min(tile.crop_y + height, tile.canvas_height), std::min(tile.crop_x + width, tile.canvas_width)};
    const bool empty = part.y0 >= part.y1 || part.x0 >= part.x1;
    if (empty || part.y1 - part.y0 < height || part.x1 - part.x0 < width) {
        for (std::size_t i = 0; i < pixels.size(); ++i) {
            pixels[i] = options.fill[i % 3];
        }
    }
    if (!empty) {
        std::uint8_t* corner = pixels.data() + ((part.y0 - tile.crop_y) * width + (part.x0 - tile.crop_x)) * 3;
        resample_part(tile.image, tile.canvas_height, tile.canvas_width, part, options.filter, tile.vertical_first, corner,
                      width * 3);
    }
}

}  // namespace

std::int64_t count_patches(const std::vector<Tile>& tiles, const PackOptions& options) {
    if (options.patch < 1 || options.patch > kMaxSide) {
        throw std::invalid_argument("patch must be in 1..16777216 pixels, got " + std::to_string(options.patch) +
                                    "; pass the vision encoder's patch_size");
    }
    std::int64_t patches = 0;
    for (std::size_t t = 0; t < tiles.size(); ++t) {
        const Tile& tile = tiles[t];
        for (const std::int64_t side : {tile.image.height, tile.image.width, tile.canvas_height, tile.canvas_width}) {
            require(side >= 1 && side <= kMaxSide, t, "image and canvas sides must be in 1..16777216 pixels", side);
        }
        for (const std::int64_t side : {tile.grid_height, tile.grid_width}) {
            require(side >= 1 && side <= kMaxSide / options.patch, t, "grid sides must be in 1..16777216 / patch", side);
        }
        for (const std::int64_t offset : {tile.crop_y, tile.crop_x}) {
            require(offset >= -kMaxSide && offset <= kMaxSide, t, "crop offsets must be within 16777216 pixels", offset);
        }
        patches += tile.grid_height * tile.grid_width;
    }
    return patches;
}

void pack_tiles(const std::vector<Tile>& tiles, const PackOptions& options, float* patches) {
    count_patches(tiles, options);
    const Table table = make_table(options);
    std::vector<float*> starts;
    std::int64_t bytes = 0;
    for (const Tile& tile : tiles) {
        bytes += tile.image.height * tile.image.width * 3;
        starts.push_back(patches);
        patches += tile.grid_height * tile.grid_width * 3 * options.patch * options.patch;
    }
    // Many tiles: one thread per tile (the regions inside then stay serial). Few tiles: the threads share each tile.
    const auto count = static_cast<std::int64_t>(tiles.size());
#ifdef _OPENMP
#pragma omp parallel if (count >= 2 * num_threads() && bytes > kParallelBytes)
#endif
    {
        std::vector<std::uint8_t> pixels;
#ifdef _OPENMP
#pragma omp for schedule(dynamic, 1)
#endif
        for (std::int64_t t = 0; t < count; ++t) {
            const Tile& tile = tiles[static_cast<std::size_t>(t)];
            fill_crop(tile, options, pixels);
            patchify(pixels, tile, options.patch, table, starts[static_cast<std::size_t>(t)]);
        }
    }
}

}  // namespace rsvlm
