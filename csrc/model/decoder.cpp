#include "rsvlm/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../ops/attention_kernels.h"
#include "rows.h"
#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// Chunks [chunks, dim + 2] of one head in order of keys -> its output.
void join_chunks(const float* partials, std::int64_t chunks, std::int64_t dim, float* out) {
    float maximum = partials[0];
    for (std::int64_t chunk = 1; chunk < chunks; ++chunk) {
        maximum = std::max(maximum, partials[chunk * (dim + 2)]);
    }
    std::fill_n(out, dim, 0.0f);
    float total = 0.0f;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk, partials += dim + 2) {
        const float factor = std::exp2(partials[0] - maximum);
        total += partials[1] * factor;
        for (std::int64_t i = 0; i < dim; ++i) {
            out[i] += partials[2 + i] * factor;
        }
    }
    for (std::int64_t i = 0; i < dim; ++i) {
        out[i] /= total;
    }
}

}  // namespace

// What all threads of one step see.
struct Decoder::Step {
    KvCache& cache;
    const DecodeRow* rows;
    std::int64_t count;
    float* logits;
    std::int32_t* best;
    float* best_logits;
    RowKernels kernels;
    void (*attention)(const DecodePart&);
};

Decoder::Decoder(DecoderShape shape, const WeightTable& weights) : shape_(std::move(shape)) {
    const std::int64_t width = shape_.heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim;
    if (shape_.kv_heads < 1 || shape_.heads % shape_.kv_heads != 0 ||
        static_cast<std::int64_t>(shape_.frequencies.size()) * 2 != shape_.head_dim) {
        throw std::invalid_argument("heads must be a multiple of kv_heads and head_dim twice the frequencies, got " +
                                    std::to_string(shape_.heads) + ", " + std::to_string(shape_.kv_heads) + ", " +
                                    std::to_string(shape_.head_dim) + "; check the package's config");
    }
    const std::int64_t gate_up = (shape_.intermediate + 31) / 32 * 64;  // blocks of 32 gates and 32 ups, one after the other
    embeddings_ = weights.linear("language_model.embed_tokens", shape_.vocabulary, shape_.hidden);
    head_ = weights.has_linear("language_model.lm_head")
                ? weights.linear("language_model.lm_head", shape_.vocabulary, shape_.hidden)
                : embeddings_;
    norm_ = weights.vector("language_model.norm.weight", shape_.hidden);
    for (std::int64_t i = 0; i < shape_.layers; ++i) {
        const std::string name = "language_model.layers." + std::to_string(i) + ".";
        layers_.push_back({weights.vector(name + "input_norm.weight", shape_.hidden),
                           weights.vector(name + "post_norm.weight", shape_.hidden),
                           weights.linear(name + "attention.qkv", width + 2 * kv_width, shape_.hidden),
                           weights.linear(name + "attention.o", shape_.hidden, width),
                           weights.linear(name + "mlp.gate_up", gate_up, shape_.hidden),
                           weights.linear(name + "mlp.down", shape_.hidden, shape_.intermediate)});
    }
}

void Decoder::embed(const std::int32_t* ids, std::int64_t count, float* out) const {
    for (std::int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= shape_.vocabulary) {
            throw std::invalid_argument("token ids must be in 0.." + std::to_string(shape_.vocabulary - 1) + ", got " +
                                        std::to_string(ids[i]) + "; use this package's tokenizer");
        }
        read_linear_row(embeddings_, ids[i], out + i * shape_.hidden);
    }
}

void Decoder::check_rows(const KvCache& cache, std::int64_t row, std::int64_t position, std::int64_t tokens) const {
    if (!cache.fits(shape_)) {
        throw std::invalid_argument(
            "cache must be of this model and of its element, got one of another decoder; make it with this "
            "decoder's cache()");
    }
    if (row < 0 || row >= cache.rows() || position < 0 || tokens < 1 || position + tokens > cache.capacity()) {
        throw std::invalid_argument("new tokens must fit a cache of " + std::to_string(cache.rows()) + " rows of " +
                                    std::to_string(cache.capacity()) + " places, got row " + std::to_string(row) + ", places " +
                                    std::to_string(position) + " to " + std::to_string(position + tokens) +
                                    "; make the cache larger");
    }
}

void Decoder::turn(std::int64_t position, float* cosines, float* sines) const {
    for (std::size_t i = 0; i < shape_.frequencies.size(); ++i) {
        const float angle = static_cast<float>(position) * shape_.frequencies[i];
        cosines[i] = std::cos(angle);
        sines[i] = std::sin(angle);
    }
}

void Decoder::reserve(std::int64_t rows, int threads, std::int64_t capacity) {
    if (rows <= reserved_rows_ && threads <= reserved_threads_ && capacity <= reserved_capacity_) {
        return;
    }
    reserved_rows_ = rows = std::max(rows, reserved_rows_);
    reserved_threads_ = threads = std::max(threads, reserved_threads_);
    reserved_capacity_ = capacity = std::max(capacity, reserved_capacity_);
    const std::int64_t hidden = padded_columns(shape_.hidden), width = padded_columns(shape_.heads * shape_.head_dim);
    const std::int64_t gated = padded_columns(shape_.intermediate), dim = shape_.head_dim;
    const auto sized = [rows](std::vector<float>& buffer, std::int64_t columns) {
        buffer.assign(static_cast<std::size_t>(rows * columns), 0.0f);
    };
    sized(x_, hidden);
    sized(qkv_, (shape_.heads + 2 * shape_.kv_heads) * dim);
    sized(attended_, width);
    sized(projected_, shape_.hidden);
    sized(gate_up_, gated * 2);
    sized(gated_, gated);
    sized(cosines_, dim / 2);
    sized(sines_, dim / 2);
    sized(logits_, shape_.vocabulary);
    best_values_.assign(static_cast<std::size_t>(rows * threads), 0.0f);
    best_ids_.assign(static_cast<std::size_t>(rows * threads), 0);
    const std::int64_t chunks = (capacity + kDecodeChunk - 1) / kDecodeChunk;
    scratch_floats_ = rows * hidden + few_scratch_floats(std::max({hidden, width, gated}), rows) + dim + chunks * (dim + 2) +
                      decode_scratch_floats(1, dim);
    scratch_floats_ = (scratch_floats_ + 15) / 16 * 16;
    scratch_.assign(static_cast<std::size_t>(scratch_floats_ * threads), 0.0f);
}

void Decoder::decode(KvCache& cache, const DecodeRow* rows, std::int64_t count, float* logits, std::int32_t* best,
                     float* best_logits) {
    const std::lock_guard<std::mutex> lock(busy_);
    for (std::int64_t i = 0; i < count; ++i) {
        check_rows(cache, rows[i].row, rows[i].position, 1);
    }
    const int threads = num_threads();
    reserve(count, threads, cache.capacity());
    const std::int64_t stride = padded_columns(shape_.hidden), half = shape_.head_dim / 2;
    for (std::int64_t i = 0; i < count; ++i) {
        embed(&rows[i].token, 1, x_.data() + i * stride);
        turn(rows[i].position, cosines_.data() + i * half, sines_.data() + i * half);
    }
    const Step step{cache, rows,        count,         logits == nullptr ? logits_.data() : logits,
                    best,  best_logits, row_kernels(), decode_kernel(shape_.cache)};
    parallel_region(threads, [&](int thread, int present) { run_step(step, thread, present); });
}

void Decoder::run_step(const Step& step, int thread, int threads) {
    const std::int64_t stride = padded_columns(shape_.hidden);
    for (std::int64_t index = 0; index < shape_.layers; ++index) {
        run_layer(step, index, thread, threads);
    }
    float* normed = scratch_.data() + thread * scratch_floats_;
    for (std::int64_t i = 0; i < step.count; ++i) {
        step.kernels.norm(
            {x_.data() + i * stride, norm_, nullptr, shape_.hidden, shape_.eps, normed + i * stride, Element::kFloat32});
    }
    const Share share = share_of(linear_blocks(head_), thread, threads);
    multiply_few(head_, normed, step.count, share.first, share.stop, step.logits, normed + reserved_rows_ * stride);
    if (step.best != nullptr) {
        write_best(step, thread, threads);
    }
}

// Each thread has seen the logits that it made; the first joins their bests, lowest ids first.
void Decoder::write_best(const Step& step, int thread, int threads) {
    const Share share = share_of(linear_blocks(head_), thread, threads);
    const std::int64_t first = share.first * 32, stop = std::min(share.stop * 32, shape_.vocabulary);
    for (std::int64_t i = 0; i < step.count; ++i) {
        const float* logits = step.logits + i * shape_.vocabulary;
        std::int64_t best = -1;
        for (std::int64_t id = first; id < stop; ++id) {
            if (best < 0 || logits[id] > logits[best] || (logits[id] != logits[id] && logits[best] == logits[best])) {
                best = id;  // NaN counts as the largest, as it does for numpy
            }
        }
        best_ids_[static_cast<std::size_t>(thread * reserved_rows_ + i)] = static_cast<std::int32_t>(best);
        best_values_[static_cast<std::size_t>(thread * reserved_rows_ + i)] = best < 0 ? 0.0f : logits[best];
    }
    barrier(threads);
    for (std::int64_t i = 0; thread == 0 && i < step.count; ++i) {
        std::int32_t best = -1;
        float value = 0.0f;
        for (int other = 0; other < threads; ++other) {
            const auto at = static_cast<std::size_t>(other * reserved_rows_ + i);
            const float found = best_values_[at];
            if (best_ids_[at] >= 0 && (best < 0 || found > value || (found != found && value == value))) {
                best = best_ids_[at];
                value = found;
            }
        }
        step.best[i] = best;
        if (step.best_logits != nullptr) {
            step.best_logits[i] = value;
        }
    }
}

void Decoder::run_layer(const Step& step, std::int64_t index, int thread, int threads) {
    const Layer& layer = layers_[static_cast<std::size_t>(index)];
    const std::int64_t stride = padded_columns(shape_.hidden), width = padded_columns(shape_.heads * shape_.head_dim);
    const std::int64_t gated = padded_columns(shape_.intermediate), dim = shape_.head_dim, half = dim / 2;
    const std::int64_t qkv_width = layer.qkv.rows, group = shape_.heads / shape_.kv_heads;
    const RowKernels& kernels = step.kernels;
    float* normed = scratch_.data() + thread * scratch_floats_;
    float* pairs = normed + reserved_rows_ * stride;
    // Norms are taken by every thread for itself: 600 values cost less than a barrier.
    const auto norm_rows = [&](const float* weight) {
        for (std::int64_t i = 0; i < step.count; ++i) {
            kernels.norm(
                {x_.data() + i * stride, weight, nullptr, shape_.hidden, shape_.eps, normed + i * stride, Element::kFloat32});
        }
    };
    // A thread adds what it has computed itself, so the residual needs no barrier of its own.
    const auto add_product = [&](const Linear& linear, const float* from) {
        const Share share = share_of(linear_blocks(linear), thread, threads);
        multiply_few(linear, from, step.count, share.first, share.stop, projected_.data(), pairs);
        const std::int64_t first = share.first * 32, stop = std::min(share.stop * 32, linear.rows);
        for (std::int64_t i = 0; i < step.count && first < stop; ++i) {
            kernels.add(projected_.data() + i * linear.rows + first, stop - first, 1.0f, x_.data() + i * stride + first);
        }
        barrier(threads);
    };

    norm_rows(layer.input_norm);
    Share share = share_of(linear_blocks(layer.qkv), thread, threads);
    multiply_few(layer.qkv, normed, step.count, share.first, share.stop, qkv_.data(), pairs);
    barrier(threads);

    share = share_of(step.count * shape_.kv_heads, thread, threads);
    for (std::int64_t part = share.first; part < share.stop; ++part) {
        const std::int64_t i = part / shape_.kv_heads, head = part % shape_.kv_heads;
        const DecodeRow& row = step.rows[i];
        const float* key = qkv_.data() + i * qkv_width + (shape_.heads + head) * dim;
        kernels.rotate(key, cosines_.data() + i * half, sines_.data() + i * half, half, shape_.cache,
                       step.cache.key(index, row.row, head, row.position));
        kernels.convert(key + shape_.kv_heads * dim, dim, shape_.cache, step.cache.value(index, row.row, head, row.position));
    }
    barrier(threads);

    float* query = pairs + few_scratch_floats(std::max({stride, width, gated}), reserved_rows_);
    float* partials = query + dim;
    const std::int64_t chunks_reserved = (reserved_capacity_ + kDecodeChunk - 1) / kDecodeChunk;
    share = share_of(step.count * shape_.heads, thread, threads);
    for (std::int64_t part = share.first; part < share.stop; ++part) {
        const std::int64_t i = part / shape_.heads, head = part % shape_.heads;
        const DecodeRow& row = step.rows[i];
        kernels.rotate(qkv_.data() + i * qkv_width + head * dim, cosines_.data() + i * half, sines_.data() + i * half, half,
                       shape_.cache, query);
        std::int64_t chunks = 0;
        for (std::int64_t place = 0; place <= row.position; place += kDecodeChunk, ++chunks) {
            step.attention({query, step.cache.key(index, row.row, head / group, place),
                            step.cache.value(index, row.row, head / group, place), nullptr, dim, dim, dim, 1,
                            std::min(kDecodeChunk, row.position + 1 - place), dim, kLog2E / std::sqrt(static_cast<float>(dim)),
                            partials + chunks * (dim + 2), partials + chunks_reserved * (dim + 2)});
        }
        join_chunks(partials, chunks, dim, attended_.data() + i * width + head * dim);
    }
    barrier(threads);
    add_product(layer.o, attended_.data());

    norm_rows(layer.post_norm);
    share = share_of(gated / 32, thread, threads);
    multiply_few(layer.gate_up, normed, step.count, share.first * 2, share.stop * 2, gate_up_.data(), pairs);
    for (std::int64_t i = 0; i < step.count; ++i) {
        for (std::int64_t block = share.first; block < share.stop; ++block) {
            const float* gate = gate_up_.data() + i * gated * 2 + block * 64;
            kernels.gate(gate, gate + 32, 32, Element::kFloat32, gated_.data() + i * gated + block * 32);
        }
    }
    barrier(threads);
    add_product(layer.down, gated_.data());
}

void Decoder::logits(const float* states, std::int64_t count, float* out) {
    const std::lock_guard<std::mutex> lock(busy_);
    const int threads = num_threads();
    reserve(count, threads, reserved_capacity_);
    const std::int64_t stride = padded_columns(shape_.hidden);
    for (std::int64_t i = 0; i < count; ++i) {
        std::memcpy(x_.data() + i * stride, states + i * shape_.hidden,
                    static_cast<std::size_t>(shape_.hidden) * sizeof(float));
    }
    const std::int64_t blocks = linear_blocks(head_);
    parallel_region(threads, [&](int thread, int present) {
        const Share share = share_of(blocks, thread, present);
        multiply_few(head_, x_.data(), count, share.first, share.stop, out,
                     scratch_.data() + thread * scratch_floats_ + reserved_rows_ * stride);
    });
}

}  // namespace rsvlm
