// SceneModel::encode: tiles through the blocks of the vision encoder.
#include <cstring>
#include <numeric>

#include "rows.h"
#include "rsvlm/cpu.h"
#include "scene_rows.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kRowsOfUnit = 320;  // their activations, 1.6 MB at ViT-S width, meet each weight while both are cached
constexpr double kSharing = 0.9;           // of a thread's speed, when all threads meet after each product

// Tiles that go through the encoder together.
struct Unit {
    std::vector<std::int64_t> tiles;
    double work = 0.0;
};

// The most work first. Short tiles share a unit, so that a weight is unpacked for a few hundred rows.
std::vector<Unit> plan_units(const std::vector<std::int64_t>& bounds, const VisionShape& vision) {
    const auto length = [&](std::int64_t tile) {
        const auto at = static_cast<std::size_t>(tile);
        return bounds[at + 1] - bounds[at] + static_cast<std::int64_t>(vision.class_token);
    };
    std::vector<std::int64_t> order(bounds.size() - 1);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return length(a) > length(b); });
    const auto weights = static_cast<double>(vision.hidden * (4 * vision.hidden + 2 * vision.intermediate));
    std::vector<Unit> units;
    std::int64_t rows = 0;
    for (const std::int64_t tile : order) {
        if (units.empty() || rows + length(tile) > kRowsOfUnit) {
            units.emplace_back();
            rows = 0;
        }
        const auto own = static_cast<double>(length(tile));
        units.back().tiles.push_back(tile);
        units.back().work += own * (weights + 2.0 * own * static_cast<double>(vision.hidden));
        rows += length(tile);
    }
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.work > b.work; });
    return units;
}

// How many of the first units threads take alone, each the next one when it is free; the rest they share, so that none waits
// long for the last one.
std::size_t units_taken_alone(const std::vector<Unit>& units, int threads) {
    if (threads == 1) {
        return units.size();
    }
    double rest = 0.0;
    for (const Unit& unit : units) {
        rest += unit.work;
    }
    std::vector<double> loads(static_cast<std::size_t>(threads), 0.0);
    std::size_t best = 0;
    double least = rest / (threads * kSharing);
    for (std::size_t count = 1; count <= units.size(); ++count) {
        const double work = units[count - 1].work;
        *std::min_element(loads.begin(), loads.end()) += work;
        rest -= work;
        const double time = *std::max_element(loads.begin(), loads.end()) + rest / (threads * kSharing);
        if (time < least) {
            least = time;
            best = count;
        }
    }
    return best;
}

}  // namespace

void SceneModel::encode(const Tiles& tiles) {
    const std::lock_guard<std::mutex> lock(busy_);
    Workspace& shared = shared_workspace();
    const std::vector<Unit> units = plan_units(tiles.bounds, shape_.vision);
    const std::size_t alone = units_taken_alone(units, shared.threads);
    if (alone > 0) {
        const int threads = shared.threads;
        shared.threads = 1;
        for_each_part(static_cast<std::int64_t>(alone), threads, 0, [&](std::int64_t unit, float*) {
            encode_some(workspaces_[static_cast<std::size_t>(thread_index())], tiles,
                        units[static_cast<std::size_t>(unit)].tiles);
        });
        shared.threads = threads;
    }
    for (std::size_t unit = alone; unit < units.size(); ++unit) {
        encode_some(shared, tiles, units[unit].tiles);
    }
}

void SceneModel::encode_some(Workspace& work, const Tiles& tiles, const std::vector<std::int64_t>& chosen) const {
    const VisionShape& vision = shape_.vision;
    const std::int64_t width = vision.hidden, extra = vision.class_token;
    const auto floats = [width](std::int64_t n) { return static_cast<std::size_t>(n * width) * sizeof(float); };
    std::vector<std::int64_t> bounds{0};  // with class tokens
    std::vector<const float*> patches;    // of each row, null for a class token
    for (const std::int64_t tile : chosen) {
        const auto at = static_cast<std::size_t>(tile);
        patches.resize(patches.size() + static_cast<std::size_t>(extra), nullptr);
        for (std::int64_t patch = tiles.bounds[at]; patch < tiles.bounds[at + 1]; ++patch) {
            patches.push_back(tiles.patches + patch * vision.patch_values);
        }
        bounds.push_back(static_cast<std::int64_t>(patches.size()));
    }
    const std::int64_t rows = bounds.back();
    float* x = work.x.hold<float>(rows * width);
    // body(tile, its first row, its patches)
    const auto for_tiles = [&](const auto& body) {
        for (std::size_t i = 0; i < chosen.size(); ++i) {
            body(static_cast<std::size_t>(chosen[i]), x + bounds[i] * width, bounds[i + 1] - bounds[i] - extra);
        }
    };
    const InputRows embedded = write_rows(work, patch_embed_, rows, [&](std::int64_t n, float* row) {
        const float* patch = patches[static_cast<std::size_t>(n)];
        if (patch == nullptr) {
            std::fill_n(row, vision.patch_values, 0.0f);
        } else {
            std::memcpy(row, patch, static_cast<std::size_t>(vision.patch_values) * sizeof(float));
        }
    });
    for_tiles([&](std::size_t tile, float* row, std::int64_t length) {
        std::memset(row, 0, floats(extra));
        std::memcpy(row + extra * width, tiles.positions[tile], floats(length));
    });
    multiply(work, patch_embed_, embedded, {x, width, true});
    const RowKernels kernels = row_kernels();
    for_tiles([&](std::size_t, float* row, std::int64_t) {
        if (extra != 0) {
            std::memcpy(row, class_token_, floats(1));
            kernels.add(class_position_, width, 1.0f, row);
        }
    });
    if (pre_norm_.weight != nullptr) {
        for_rows(rows, work.threads, 0, [&](std::int64_t n, float*) {
            float* row = x + n * width;
            kernels.norm({row, pre_norm_.weight, pre_norm_.bias, width, vision.eps, row, Element::kFloat32});
        });
    }
    for (std::int64_t index = 0;; ++index) {
        for (std::size_t level = 0; level < 3; ++level) {
            if (vision.taps[level] == index) {
                for_tiles([&](std::size_t tile, const float* row, std::int64_t length) {
                    if (extra != 0) {
                        std::memcpy(tiles.class_tokens[level] + static_cast<std::int64_t>(tile) * width, row, floats(1));
                    }
                    std::memcpy(tiles.taps[level] + tiles.bounds[tile] * width, row + extra * width, floats(length));
                });
            }
        }
        if (index == vision.taps[2]) {
            break;
        }
        const Block& block = blocks_[static_cast<std::size_t>(index)];
        void* qkv = work.narrow.hold<float>(rows * 3 * width);  // wide enough for either element
        multiply_narrow(work, block.qkv, norm_rows(work, block.qkv, x, rows, block.norm1, vision.eps), qkv);
        const InputRows attended =
            attend(work, block.o, rows, vision.heads,
                   {{{qkv, 3 * width, 0}, {qkv, 3 * width, width}, {qkv, 3 * width, 2 * width}}}, bounds, bounds);
        multiply(work, block.o, attended, {x, width, true, block.scale1});
        const InputRows normed = norm_rows(work, block.fc1, x, rows, block.norm2, vision.eps);
        const InputRows active = activate(work, block.fc1, normed, vision.activation, block.fc2);
        multiply(work, block.fc2, active, {x, width, true, block.scale2});
    }
}

}  // namespace rsvlm
