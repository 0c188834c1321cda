// The parts of SceneModel that know levels: alignment heads, augmentation, experts.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "rows.h"
#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/grouped_experts.h"
#include "rsvlm/route.h"
#include "rsvlm/scene_model.h"

namespace rsvlm {
namespace {

constexpr float kEps = 1e-5f;        // of the norms inside augmentation and experts
constexpr float kSmallest = 1e-12f;  // lengths below are not divided by, as torch's normalize has it

void normalise(float* x, std::int64_t width) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < width; ++i) {
        sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    const float length = std::max(static_cast<float>(std::sqrt(sum)), kSmallest);
    for (std::int64_t i = 0; i < width; ++i) {
        x[i] /= length;
    }
}

std::vector<float> mean_of(const float* rows, std::int64_t count, std::int64_t width, const RowKernels& kernels) {
    std::vector<float> mean(static_cast<std::size_t>(width), 0.0f);
    for (std::int64_t n = 0; n < count; ++n) {
        kernels.add(rows + n * width, width, 1.0f, mean.data());
    }
    for (float& value : mean) {
        value /= static_cast<float>(count);
    }
    return mean;
}

// The `keep` rows farthest from their mean, which is what the tile mostly shows; ties to the first.
std::vector<std::int64_t> most_salient(const float* rows, std::int64_t count, std::int64_t width, std::int64_t keep,
                                       const RowKernels& kernels) {
    const std::vector<float> mean = mean_of(rows, count, width, kernels);
    std::vector<float> distances(static_cast<std::size_t>(count)), difference(static_cast<std::size_t>(width));
    for (std::int64_t n = 0; n < count; ++n) {
        std::memcpy(difference.data(), rows + n * width, difference.size() * sizeof(float));
        kernels.add(mean.data(), width, -1.0f, difference.data());
        float sum = 0.0f;
        for (const float value : difference) {
            sum += value * value;
        }
        distances[static_cast<std::size_t>(n)] = sum;
    }
    std::vector<std::int64_t> order(static_cast<std::size_t>(count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
        return distances[static_cast<std::size_t>(a)] > distances[static_cast<std::size_t>(b)];
    });
    order.resize(static_cast<std::size_t>(keep));
    return order;
}

}  // namespace

void SceneModel::run_head(const Head& head, std::int64_t count, const float* x, float* out) {
    Workspace& work = shared_workspace();
    const InputRows normed = norm_rows(work, head.proj, x, count, head.norm, shape_.vision.eps);
    multiply(work, head.proj, normed, {out, shape_.embed});
    for (std::int64_t n = 0; n < count; ++n) {
        normalise(out + n * shape_.embed, shape_.embed);
    }
}

std::int64_t SceneModel::salient_count(const std::vector<std::int64_t>& bounds) const {
    std::int64_t count = shape_.salient_patches;
    for (std::size_t tile = 0; tile + 1 < bounds.size(); ++tile) {
        count = std::min(count, bounds[tile + 1] - bounds[tile]);
    }
    return count;
}

void SceneModel::align(const std::array<const float*, 3>& taps, const float* scene_class_token,
                       const std::vector<std::int64_t>& bounds, const std::array<float*, 3>& out) {
    const std::lock_guard<std::mutex> lock(busy_);
    const std::int64_t width = shape_.vision.hidden, tiles = static_cast<std::int64_t>(bounds.size()) - 1;
    const RowKernels kernels = row_kernels();
    std::vector<float> chosen;
    if (out[0] != nullptr) {
        const std::int64_t keep = salient_count(bounds);
        for (std::size_t tile = 0; tile + 1 < bounds.size(); ++tile) {
            const float* rows = taps[0] + bounds[tile] * width;
            for (const std::int64_t n : most_salient(rows, bounds[tile + 1] - bounds[tile], width, keep, kernels)) {
                chosen.insert(chosen.end(), rows + n * width, rows + (n + 1) * width);
            }
        }
        run_head(heads_[0], tiles * keep, chosen.data(), out[0]);
    }
    if (out[1] != nullptr) {
        chosen.clear();
        for (std::size_t tile = 0; tile + 1 < bounds.size(); ++tile) {
            const std::vector<float> mean =
                mean_of(taps[1] + bounds[tile] * width, bounds[tile + 1] - bounds[tile], width, kernels);
            chosen.insert(chosen.end(), mean.begin(), mean.end());
        }
        run_head(heads_[1], tiles, chosen.data(), out[1]);
    }
    if (out[2] != nullptr) {
        const std::vector<float> mean = mean_of(taps[2], bounds[1], width, kernels);
        run_head(heads_[2], 1, shape_.class_pooling ? scene_class_token : mean.data(), out[2]);
    }
}

void SceneModel::embed_states(const float* states, std::int64_t count, float* out) {
    const std::lock_guard<std::mutex> lock(busy_);
    Workspace& work = shared_workspace();
    multiply(work, text_proj_, convert_rows(work, text_proj_, states, count), {out, shape_.embed});
    for (std::int64_t n = 0; n < count; ++n) {
        normalise(out + n * shape_.embed, shape_.embed);
    }
}

void SceneModel::bridge(const std::array<const float*, 3>& taps, std::int64_t patches, const std::array<Rows, 3>& cues,
                        const Rows& query, float* out) {
    const std::lock_guard<std::mutex> lock(busy_);
    const auto size = static_cast<std::size_t>(patches * shape_.vision.hidden);
    std::array<const float*, 3> features = taps;
    if (!levels_.empty()) {
        float* augmented = augmented_.hold<float>(static_cast<std::int64_t>(3 * size));
        for (std::size_t level = 0; level < 3; ++level) {
            float* to = augmented + level * size;
            augment(levels_[level], taps[level], patches, cues[level], query, to);
            features[level] = to;
        }
    }
    if (routers_.empty()) {
        std::memcpy(out, features[2], size * sizeof(float));
    } else {
        run_experts(taps[2], features, patches, out);
    }
}

void SceneModel::augment(const Level& level, const float* features, std::int64_t patches, const Rows& cues, const Rows& query,
                         float* out) {
    const std::int64_t width = shape_.vision.hidden, keys = cues.count + query.count;
    std::memcpy(out, features, static_cast<std::size_t>(patches * width) * sizeof(float));
    if (keys == 0) {
        return;  // nothing to look at gives zeros, and the last projection has no bias
    }
    Workspace& work = shared_workspace();
    float* context = context_.hold<float>(keys * width);
    if (cues.count > 0) {
        multiply(work, cue_proj_, convert_rows(work, cue_proj_, cues.values, cues.count), {context, width});
    }
    if (query.count > 0) {
        const InputRows queries = convert_rows(work, query_proj_, query.values, query.count);
        multiply(work, query_proj_, queries, {context + cues.count * width, width});
    }
    float* q = work.narrow.hold<float>((patches + 2 * keys) * width);  // wide enough for either element
    float* kv = q + patches * width;
    multiply_narrow(work, level.kv, convert_rows(work, level.kv, context, keys), kv);
    multiply_narrow(work, level.q, norm_rows(work, level.q, features, patches, level.norm, kEps), q);
    const InputRows attended = attend(work, level.o, patches, shape_.augmentation_heads,
                                      {{{q, width, 0}, {kv, 2 * width, 0}, {kv, 2 * width, width}}}, {0, patches}, {0, keys});
    multiply(work, level.o, attended, {out, width, true, level.gate.data()});
}

void SceneModel::run_experts(const float* base, const std::array<const float*, 3>& features, std::int64_t patches, float* out) {
    const std::int64_t width = shape_.vision.hidden, tokens = 3 * patches, group = shape_.experts / 3;
    const std::int64_t stride = padded_columns(width), bytes = element_ == Element::kBfloat16 ? 2 : 4;
    const RowKernels kernels = row_kernels();
    std::vector<float> normed(static_cast<std::size_t>(patches * stride)), own(static_cast<std::size_t>(patches * group));
    std::vector<float> logits(static_cast<std::size_t>(tokens * shape_.experts), 0.0f);
    std::vector<float> weights(static_cast<std::size_t>(tokens * shape_.top_k));
    std::vector<float> scratch(static_cast<std::size_t>(few_scratch_floats(width, patches)));
    std::vector<char> stacked(static_cast<std::size_t>(tokens * width * bytes)), mixed(stacked.size());
    for (std::int64_t level = 0; level < 3; ++level) {
        const Router& router = routers_[static_cast<std::size_t>(level)];
        for (std::int64_t n = 0; n < patches; ++n) {
            float* row = normed.data() + n * stride;
            kernels.norm({features[static_cast<std::size_t>(level)] + n * width, router.norm.weight, router.norm.bias, width,
                          kEps, row, Element::kFloat32});
            kernels.convert(row, width, element_, stacked.data() + (level * patches + n) * width * bytes);
        }
        // fp32 whatever the weights are: near-ties between experts must not flip with the model's precision
        multiply_few(router.router, normed.data(), patches, 0, linear_blocks(router.router), own.data(), scratch.data());
        for (std::int64_t n = 0; n < patches; ++n) {
            std::memcpy(logits.data() + (level * patches + n) * shape_.experts + level * group, own.data() + n * group,
                        static_cast<std::size_t>(group) * sizeof(float));
        }
    }
    std::vector<std::int32_t> offsets(static_cast<std::size_t>(shape_.experts + 1));
    std::vector<std::int32_t> permutation(static_cast<std::size_t>(tokens * shape_.top_k));
    route(logits.data(), tokens, shape_.experts, {0, patches, 2 * patches, tokens}, shape_.top_k,
          {offsets.data(), permutation.data(), weights.data()});
    grouped_experts({stacked.data(), offsets.data(), permutation.data(), weights.data(), w_gate_, w_up_, w_down_, b_up_,
                     b_down_, mixed.data(), tokens, width, w_up_ == nullptr ? width : shape_.expert_hidden, shape_.experts,
                     shape_.top_k, element_});
    std::memcpy(out, base, static_cast<std::size_t>(patches * width) * sizeof(float));
    for (std::int64_t level = 0; level < 3; ++level) {
        const float gate = routers_[static_cast<std::size_t>(level)].gate;
        for (std::int64_t n = 0; n < patches; ++n) {
            const char* part = mixed.data() + (level * patches + n) * width * bytes;
            if (element_ == Element::kBfloat16) {
                for (std::int64_t i = 0; i < width; ++i) {
                    out[n * width + i] += gate * widen(reinterpret_cast<const std::uint16_t*>(part)[i]);
                }
            } else {
                kernels.add(reinterpret_cast<const float*>(part), width, gate, out + n * width);
            }
        }
    }
}

}  // namespace rsvlm
