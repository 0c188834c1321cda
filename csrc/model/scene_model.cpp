#include "rsvlm/scene_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rows.h"
#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"
#include "rsvlm/varlen_tile_attention.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kRowsAtOnce = 16;  // of a loop over rows: some microseconds of work

std::int64_t element_bytes(Element element) { return element == Element::kBfloat16 ? 2 : 4; }

// body(row, scratch) for all rows, on all threads, each with `floats` floats of its own.
template <class Body>
void for_rows(std::int64_t count, std::int64_t floats, const Body& body) {
    const std::int64_t parts = (count + kRowsAtOnce - 1) / kRowsAtOnce;
    for_each_part(parts, num_threads(), static_cast<std::size_t>(floats), [&](std::int64_t part, float* scratch) {
        for (std::int64_t row = part * kRowsAtOnce; row < std::min((part + 1) * kRowsAtOnce, count); ++row) {
            body(row, scratch);
        }
    });
}

}  // namespace

SceneModel::Norm SceneModel::norm(const WeightTable& weights, const std::string& name) const {
    return {weights.vector(name + ".weight", shape_.vision.hidden), weights.vector(name + ".bias", shape_.vision.hidden)};
}

SceneModel::SceneModel(const SceneShape& shape, const WeightTable& weights) : shape_(shape) {
    const VisionShape& vision = shape_.vision;
    const std::int64_t width = vision.hidden;
    patch_embed_ = weights.linear("vision_encoder.patch_embed", width, vision.patch_values);
    element_ = patch_embed_.kind == LinearKind::kFloat32 ? Element::kFloat32 : Element::kBfloat16;
    if (vision.class_token) {
        class_token_ = weights.vector("vision_encoder.class_token", width);
        class_position_ = weights.vector("vision_encoder.class_position", width);
    }
    if (weights.has_vector("vision_encoder.pre_norm.weight")) {
        pre_norm_ = norm(weights, "vision_encoder.pre_norm");
    }
    for (std::int64_t i = 0; i < vision.taps[2]; ++i) {
        const std::string name = "vision_encoder.blocks." + std::to_string(i) + ".";
        blocks_.push_back({norm(weights, name + "norm1"), norm(weights, name + "norm2"),
                           weights.linear(name + "attention.qkv", 3 * width, width),
                           weights.linear(name + "attention.o", width, width),
                           weights.linear(name + "mlp.fc1", vision.intermediate, width),
                           weights.linear(name + "mlp.fc2", width, vision.intermediate),
                           weights.vector_or_null(name + "scale1", width), weights.vector_or_null(name + "scale2", width)});
    }
    const char* const names[] = {"object", "region", "scene"};
    for (std::size_t level = 0; shape_.embed > 0 && level < 3; ++level) {
        const std::string name = std::string("alignment.") + names[level] + ".";
        if (weights.has_linear(name + "proj")) {
            heads_[level] = {norm(weights, name + "norm"), weights.linear(name + "proj", shape_.embed, width)};
        }
    }
    if (shape_.embed > 0) {
        text_proj_ = weights.linear("alignment.text_proj", shape_.embed, shape_.text);
    }
    for (std::size_t level = 0; shape_.augmentation_heads > 0 && level < 3; ++level) {
        const std::string name = "augmentation.levels." + std::to_string(level) + ".";
        cue_proj_ = weights.linear("augmentation.cue_proj", width, shape_.embed);
        query_proj_ = weights.linear("augmentation.query_proj", width, shape_.language);
        levels_.push_back({norm(weights, name + "norm"), weights.linear(name + "q", width, width),
                           weights.linear(name + "kv", 2 * width, width), weights.linear(name + "o", width, width),
                           std::vector<float>(static_cast<std::size_t>(width), std::tanh(*weights.vector(name + "gate", 1)))});
    }
    for (std::size_t level = 0; shape_.experts > 0 && level < 3; ++level) {
        const std::string name = "experts.levels." + std::to_string(level) + ".";
        routers_.push_back({norm(weights, name + "norm"), weights.linear(name + "router", shape_.experts / 3, width),
                            std::tanh(*weights.vector(name + "gate", 1))});
    }
    if (shape_.experts > 0) {
        const auto plain = [&](const char* name, std::int64_t count) -> const void* {
            return element_ == Element::kBfloat16 ? weights.raw_or_null(name, count)
                                                  : static_cast<const void*>(weights.vector_or_null(name, count));
        };
        const std::int64_t matrix = shape_.experts * shape_.expert_hidden * width;
        w_gate_ = plain("experts.w_gate", matrix);
        w_up_ = plain("experts.w_up", matrix);
        w_down_ = plain("experts.w_down", w_up_ == nullptr ? shape_.experts * width * width : matrix);
        b_up_ = plain("experts.b_up", shape_.experts * shape_.expert_hidden);
        b_down_ = plain("experts.b_down", shape_.experts * width);
        if (w_down_ == nullptr) {
            throw std::invalid_argument("weight experts.w_down must exist, got nothing; export the package again");
        }
    }
    if (shape_.projector > 0) {
        const std::int64_t merged = width * shape_.pixel_shuffle * shape_.pixel_shuffle;
        fc1_ = weights.linear("projector.fc1", shape_.projector, merged);
        fc2_ = weights.linear("projector.fc2", shape_.language, shape_.projector);
        if (weights.has_vector("projector.input_norm.weight")) {
            input_norm_ = norm(weights, "projector.input_norm");
        }
    }
}

// Rows of x for a product with `linear`, which multiply() takes: make(row, buffer of a row's floats) gives the floats.
template <class Make>
void SceneModel::write_rows(const Linear& linear, std::int64_t count, const Make& make) {
    const Operand operand = operand_of(linear);
    const std::int64_t bytes = operand_row_bytes(operand, linear.columns);
    rows_.resize(static_cast<std::size_t>(count * bytes));
    for_rows(count, padded_columns(linear.columns), [&](std::int64_t n, float* row) {
        make(n, row);
        write_operand_row(operand, row, linear.columns, rows_.data() + n * bytes);
    });
}

void SceneModel::convert_rows(const Linear& linear, const float* x, std::int64_t count) {
    write_rows(linear, count, [&](std::int64_t n, float* row) {
        std::memcpy(row, x + n * linear.columns, static_cast<std::size_t>(linear.columns) * sizeof(float));
    });
}

void SceneModel::norm_rows(const Linear& linear, const float* x, std::int64_t count, const Norm& norm, float eps) {
    const RowKernels kernels = row_kernels();
    const std::int64_t width = linear.columns;
    write_rows(linear, count, [&](std::int64_t n, float* row) {
        kernels.norm({x + n * width, norm.weight, norm.bias, width, eps, row, Element::kFloat32});
    });
}

void SceneModel::multiply(const Linear& linear, std::int64_t count, float* out, bool add, const float* scale) {
    multiply_many(linear, {rows_.data(), operand_of(linear), count, out, linear.rows, add, scale});
}

// wide_ [count, columns] -> rows_.
void SceneModel::activate(const Linear& linear, std::int64_t count, Activation activation) {
    const RowKernels kernels = row_kernels();
    const std::int64_t width = linear.columns;
    write_rows(linear, count, [&](std::int64_t n, float* row) {
        kernels.activate(wide_.data() + n * width, width, activation, Element::kFloat32, row);
    });
}

// q [rows, q_stride], and kv [keys, kv_stride] with keys before values -> rows_ for `linear`, the heads side by side.
void SceneModel::attend(const Linear& linear, std::int64_t rows, std::int64_t heads, const float* q, std::int64_t q_stride,
                        const float* kv, std::int64_t kv_stride, std::int64_t keys, const std::vector<std::int64_t>& bounds,
                        const std::vector<std::int64_t>& key_bounds) {
    const std::int64_t width = shape_.vision.hidden, dim = width / heads, bytes = element_bytes(element_);
    attended_.resize(static_cast<std::size_t>(rows * width * bytes));
    TileAttention call{{q, q_stride, dim},
                       {kv, kv_stride, dim},
                       {kv + width, kv_stride, dim},
                       attended_.data(),
                       heads,
                       dim,
                       element_,
                       1.0f / std::sqrt(static_cast<float>(dim))};
    if (element_ == Element::kBfloat16) {
        queries_.resize(static_cast<std::size_t>((rows + 2 * keys) * width) * 2);
        auto* narrow = reinterpret_cast<std::uint16_t*>(queries_.data());
        const RowKernels kernels = row_kernels();
        for_rows(rows, 0,
                 [&](std::int64_t n, float*) { kernels.convert(q + n * q_stride, width, element_, narrow + n * width); });
        std::uint16_t* pairs = narrow + rows * width;
        for_rows(keys, 0, [&](std::int64_t n, float*) {
            kernels.convert(kv + n * kv_stride, 2 * width, element_, pairs + n * 2 * width);
        });
        call.q = {narrow, width, dim};
        call.k = {pairs, 2 * width, dim};
        call.v = {pairs + width, 2 * width, dim};
    }
    varlen_tile_attention(call, bounds, key_bounds);
    write_rows(linear, rows, [&](std::int64_t n, float* row) {
        const char* from = attended_.data() + n * width * bytes;
        if (element_ == Element::kFloat32) {
            std::memcpy(row, from, static_cast<std::size_t>(width * bytes));
            return;
        }
        for (std::int64_t i = 0; i < width; ++i) {
            row[i] = widen(reinterpret_cast<const std::uint16_t*>(from)[i]);
        }
    });
}

void SceneModel::encode(const float* patches, const float* positions, const std::vector<std::int64_t>& bounds,
                        const std::array<float*, 3>& taps, const std::array<float*, 3>& class_tokens) {
    const std::lock_guard<std::mutex> lock(busy_);
    const VisionShape& vision = shape_.vision;
    const std::int64_t width = vision.hidden, tiles = static_cast<std::int64_t>(bounds.size()) - 1, extra = vision.class_token;
    const std::int64_t count = bounds.back(), rows = count + tiles * extra;
    std::vector<std::int64_t> own_bounds;  // with class tokens
    for (std::int64_t tile = 0; tile <= tiles; ++tile) {
        own_bounds.push_back(bounds[static_cast<std::size_t>(tile)] + tile * extra);
    }
    // body(tile, first row in x_, first patch, patches)
    const auto for_tiles = [&](const auto& body) {
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const auto at = static_cast<std::size_t>(tile);
            body(tile, own_bounds[at], bounds[at], bounds[at + 1] - bounds[at]);
        }
    };
    const auto floats = [width](std::int64_t n) { return static_cast<std::size_t>(n * width) * sizeof(float); };
    x_.resize(static_cast<std::size_t>(rows * width));
    wide_.resize(static_cast<std::size_t>(rows * std::max(3 * width, vision.intermediate)));
    convert_rows(patch_embed_, patches, count);
    multiply(patch_embed_, count, wide_.data());
    const RowKernels kernels = row_kernels();
    kernels.add(positions, count * width, 1.0f, wide_.data());
    for_tiles([&](std::int64_t, std::int64_t row, std::int64_t patch, std::int64_t length) {
        float* x = x_.data() + row * width;
        if (extra != 0) {
            std::memcpy(x, class_token_, floats(1));
            kernels.add(class_position_, width, 1.0f, x);
        }
        std::memcpy(x + extra * width, wide_.data() + patch * width, floats(length));
    });
    if (pre_norm_.weight != nullptr) {
        for_rows(rows, 0, [&](std::int64_t n, float*) {
            float* x = x_.data() + n * width;
            kernels.norm({x, pre_norm_.weight, pre_norm_.bias, width, vision.eps, x, Element::kFloat32});
        });
    }
    for (std::int64_t index = 0;; ++index) {
        for (std::size_t level = 0; level < 3; ++level) {
            if (vision.taps[level] == index) {
                for_tiles([&](std::int64_t tile, std::int64_t row, std::int64_t patch, std::int64_t length) {
                    const float* x = x_.data() + row * width;
                    if (extra != 0) {
                        std::memcpy(class_tokens[level] + tile * width, x, floats(1));
                    }
                    std::memcpy(taps[level] + patch * width, x + extra * width, floats(length));
                });
            }
        }
        if (index == vision.taps[2]) {
            break;
        }
        const Block& block = blocks_[static_cast<std::size_t>(index)];
        norm_rows(block.qkv, x_.data(), rows, block.norm1, vision.eps);
        multiply(block.qkv, rows, wide_.data());
        attend(block.o, rows, vision.heads, wide_.data(), 3 * width, wide_.data() + width, 3 * width, rows, own_bounds,
               own_bounds);
        multiply(block.o, rows, x_.data(), true, block.scale1);
        norm_rows(block.fc1, x_.data(), rows, block.norm2, vision.eps);
        multiply(block.fc1, rows, wide_.data());
        activate(block.fc2, rows, vision.activation);
        multiply(block.fc2, rows, x_.data(), true, block.scale2);
    }
}

void SceneModel::project(const float* features, const std::vector<std::array<std::int64_t, 2>>& grids, float* out) {
    const std::lock_guard<std::mutex> lock(busy_);
    const std::int64_t width = shape_.vision.hidden, side = shape_.pixel_shuffle;
    std::int64_t count = 0;
    for (const auto& grid : grids) {
        count += grid[0] * grid[1];
    }
    const RowKernels kernels = row_kernels();
    if (input_norm_.weight != nullptr) {
        x_.resize(static_cast<std::size_t>(count * width));
        for_rows(count, 0, [&](std::int64_t n, float*) {
            kernels.norm({features + n * width, input_norm_.weight, input_norm_.bias, width, 1e-5f, x_.data() + n * width,
                          Element::kFloat32});
        });
        features = x_.data();
    }
    if (side == 2) {  // four patches of one square become one row, in the order of reading
        context_.resize(static_cast<std::size_t>(count * width));
        float* to = context_.data();
        for (const auto& grid : grids) {
            for (std::int64_t n = 0; n < grid[0] * grid[1]; ++n) {
                const std::int64_t square = n / 4, across = grid[1] / 2;
                const std::int64_t row = square / across * 2 + n % 4 / 2, column = square % across * 2 + n % 2;
                std::memcpy(to + n * width, features + (row * grid[1] + column) * width,
                            static_cast<std::size_t>(width) * sizeof(float));
            }
            features += grid[0] * grid[1] * width;
            to += grid[0] * grid[1] * width;
        }
        features = context_.data();
    }
    const std::int64_t tokens = count / (side * side);
    wide_.resize(static_cast<std::size_t>(tokens * shape_.projector));
    convert_rows(fc1_, features, tokens);
    multiply(fc1_, tokens, wide_.data());
    activate(fc2_, tokens, shape_.projector_activation);
    multiply(fc2_, tokens, out);
}

}  // namespace rsvlm
