#include "rsvlm/scene_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rows.h"
#include "rsvlm/cpu.h"
#include "scene_rows.h"

namespace rsvlm {
namespace {

std::int64_t element_bytes(Element element) { return element == Element::kBfloat16 ? 2 : 4; }

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

SceneModel::Workspace& SceneModel::shared_workspace() {
    const auto threads = static_cast<std::size_t>(num_threads());
    if (workspaces_.size() < threads) {
        workspaces_.resize(threads);
    }
    workspaces_[0].threads = num_threads();
    return workspaces_[0];
}

SceneModel::InputRows SceneModel::convert_rows(Workspace& work, const Linear& linear, const float* x, std::int64_t count) {
    return write_rows(work, linear, count, [&](std::int64_t n, float* row) {
        std::memcpy(row, x + n * linear.columns, static_cast<std::size_t>(linear.columns) * sizeof(float));
    });
}

SceneModel::InputRows SceneModel::norm_rows(Workspace& work, const Linear& linear, const float* x, std::int64_t count,
                                            const Norm& norm, float eps) {
    const RowKernels kernels = row_kernels();
    const std::int64_t width = linear.columns;
    return write_rows(work, linear, count, [&](std::int64_t n, float* row) {
        kernels.norm({x + n * width, norm.weight, norm.bias, width, eps, row, Element::kFloat32});
    });
}

void SceneModel::multiply(const Workspace& work, const Linear& linear, const InputRows& x, const ProductsTo& to) {
    multiply_many(linear, {x.rows, operand_of(linear), x.count, work.threads}, to);
}

SceneModel::InputRows SceneModel::activate(Workspace& work, const Linear& linear, const InputRows& x, Activation activation,
                                           const Linear& next) {
    const RowKernels kernels = row_kernels();
    const Operand operand = operand_of(next);
    char* rows = work.hidden.hold<char>(x.count * operand_row_bytes(operand, next.columns));
    multiply_into(linear, {x.rows, operand_of(linear), x.count, work.threads}, 1, [&](const Products& products) {
        kernels.activate(products.sums, products.tokens * products.columns, activation, Element::kFloat32, products.sums);
        write_operand_columns(operand, products.sums, products.tokens, products.column, next.columns,
                              rows + products.token * operand_row_bytes(operand, next.columns));
    });
    return {rows, x.count};
}

void SceneModel::multiply_narrow(const Workspace& work, const Linear& linear, const InputRows& x, void* out) const {
    const RowKernels kernels = row_kernels();
    const std::int64_t bytes = element_bytes(element_);
    multiply_into(linear, {x.rows, operand_of(linear), x.count, work.threads}, 1, [&](const Products& products) {
        char* to = static_cast<char*>(out) + (products.token * linear.rows + products.column) * bytes;
        kernels.convert_block({products.sums, products.tokens, products.columns,
                               std::min(products.columns, linear.rows - products.column), element_, to, linear.rows});
    });
}

SceneModel::InputRows SceneModel::attend(Workspace& work, const Linear& next, std::int64_t rows, std::int64_t heads,
                                         const std::array<HeadsAt, 3>& qkv, const std::vector<std::int64_t>& bounds,
                                         const std::vector<std::int64_t>& key_bounds) const {
    const std::int64_t width = shape_.vision.hidden, dim = width / heads, bytes = element_bytes(element_);
    char* attended = work.attended.hold<char>(rows * width * bytes);
    const auto operand = [&](const HeadsAt& heads_at) {
        return HeadRows{static_cast<const char*>(heads_at.rows) + heads_at.at * bytes, heads_at.row_stride, dim};
    };
    varlen_tile_attention({operand(qkv[0]), operand(qkv[1]), operand(qkv[2]), attended, heads, dim, element_,
                           1.0f / std::sqrt(static_cast<float>(dim)), work.threads},
                          bounds, key_bounds);
    const RowKernels kernels = row_kernels();
    return write_rows(work, next, rows, [&](std::int64_t n, float* row) {
        const char* from = attended + n * width * bytes;
        if (element_ == Element::kFloat32) {
            std::memcpy(row, from, static_cast<std::size_t>(width * bytes));
        } else {
            kernels.widen(reinterpret_cast<const std::uint16_t*>(from), width, row);
        }
    });
}

void SceneModel::project(const float* features, const std::vector<std::array<std::int64_t, 2>>& grids, float* out) {
    const std::lock_guard<std::mutex> lock(busy_);
    const std::int64_t width = shape_.vision.hidden, side = shape_.pixel_shuffle;
    std::int64_t count = 0;
    for (const auto& grid : grids) {
        count += grid[0] * grid[1];
    }
    Workspace& work = shared_workspace();
    const RowKernels kernels = row_kernels();
    if (input_norm_.weight != nullptr) {
        float* normed = work.x.hold<float>(count * width);
        for_rows(count, work.threads, 0, [&](std::int64_t n, float*) {
            kernels.norm({features + n * width, input_norm_.weight, input_norm_.bias, width, 1e-5f, normed + n * width,
                          Element::kFloat32});
        });
        features = normed;
    }
    if (side == 2) {  // four patches of one square become one row, in the order of reading
        float* const merged = context_.hold<float>(count * width);
        float* to = merged;
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
        features = merged;
    }
    const std::int64_t tokens = count / (side * side);
    const InputRows active =
        activate(work, fc1_, convert_rows(work, fc1_, features, tokens), shape_.projector_activation, fc2_);
    multiply(work, fc2_, active, {out, shape_.language});
}

}  // namespace rsvlm
