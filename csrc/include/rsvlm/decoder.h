// The Llama / Qwen2 language model over a KV cache: prompts in blocks of rows, then token by token. Knows no text, no images,
// no sampling and no Python.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "rsvlm/element.h"
#include "rsvlm/linear.h"
#include "rsvlm/scratch.h"
#include "rsvlm/weight_table.h"

namespace rsvlm {

struct DecoderShape {
    std::int64_t vocabulary, hidden, intermediate, layers, heads, kv_heads, head_dim;
    float eps;
    Element cache;                   // of keys and values
    std::vector<float> frequencies;  // [head_dim / 2] radians per position
};

// Keys, turned to their positions, and values: [layers, rows, kv_heads, capacity, head_dim]. Never grows.
class KvCache {
  public:
    // Throws std::invalid_argument for empty sides or more than 2^24 places, std::bad_alloc.
    KvCache(const DecoderShape& shape, std::int64_t rows, std::int64_t capacity);

    // The first `length` places of a row of `from`, which has the same model.
    void copy_row(const KvCache& from, std::int64_t from_row, std::int64_t to_row, std::int64_t length);

    std::int64_t rows() const { return rows_; }
    std::int64_t capacity() const { return capacity_; }
    // Whether this is a cache of such a model: of another one, places lie elsewhere.
    bool fits(const DecoderShape& shape) const;
    void* key(std::int64_t layer, std::int64_t row, std::int64_t head, std::int64_t place) const {
        return keys_.get() + offset(layer, row, head, place);
    }
    void* value(std::int64_t layer, std::int64_t row, std::int64_t head, std::int64_t place) const {
        return values_.get() + offset(layer, row, head, place);
    }

  private:
    std::int64_t offset(std::int64_t layer, std::int64_t row, std::int64_t head, std::int64_t place) const {
        return (((layer * rows_ + row) * kv_heads_ + head) * capacity_ + place) * place_bytes_;
    }

    std::int64_t layers_, rows_, kv_heads_, capacity_, place_bytes_;
    Element element_;
    std::unique_ptr<char[]> keys_, values_;
};

// A new token of a cache row. Several of one row stand at rising positions and see those before them.
struct DecodeRow {
    std::int64_t row, position;
    std::int32_t token;
};

// `tokens` new embeddings of a cache row, from `position` on.
struct PrefillRow {
    std::int64_t row, position, tokens;
};

// Calls exclude each other. A row's bits depend on no other row, on no thread count and, in prefill, not on how it is cut.
class Decoder {
  public:
    // Throws std::invalid_argument for weights that do not fit the shape.
    Decoder(DecoderShape shape, const WeightTable& weights);

    const DecoderShape& shape() const { return shape_; }

    // ids [count] -> [count, hidden]. Throws std::invalid_argument for ids outside of the vocabulary.
    void embed(const std::int32_t* ids, std::int64_t count, float* out) const;

    // Embeddings of all rows, one after another [sum of tokens, hidden] -> the state after each row's last token [count,
    // hidden], final norm applied.
    void prefill(KvCache& cache, const PrefillRow* rows, std::int64_t count, const float* embeddings, float* states);

    // [count, hidden] -> [count, vocabulary].
    void logits(const float* states, std::int64_t count, float* out);

    // One step: logits [count, vocabulary] unless null, and the most likely ids [count] (ties to the lowest) with their logits
    // [count] unless null. One parallel region; no memory is allocated once a step of as many rows has run.
    void decode(KvCache& cache, const DecodeRow* rows, std::int64_t count, float* logits, std::int32_t* best,
                float* best_logits = nullptr);

  private:
    struct Layer {
        const float *input_norm, *post_norm;
        Linear qkv, o, gate_up, down;
    };
    struct Step;

    void check_rows(const KvCache& cache, std::int64_t row, std::int64_t position, std::int64_t tokens) const;
    void reserve(std::int64_t rows, int threads, std::int64_t capacity);
    void run_step(const Step& step, int thread, int threads);
    void run_layer(const Step& step, std::int64_t index, int thread, int threads);
    void write_best(const Step& step, int thread, int threads);
    void turn(std::int64_t position, float* cosines, float* sines) const;
    void prefill_rows(KvCache& cache, const PrefillRow* rows, std::int64_t count, float* x, float* states);

    DecoderShape shape_;
    std::vector<Layer> layers_;
    const float* norm_;
    Linear embeddings_, head_;
    std::mutex busy_;

    // A step's rows. Widths are padded to 32 columns, the padding stays zero.
    std::int64_t reserved_rows_ = 0, reserved_capacity_ = 0, scratch_floats_ = 0;
    int reserved_threads_ = 0;
    std::vector<float> x_, qkv_, attended_, projected_, gate_up_, gated_, cosines_, sines_, logits_, scratch_, best_values_;
    std::vector<std::int32_t> best_ids_;
    Buffer prompt_x_, prompt_qkv_, inputs_, gated_inputs_, queries_, outputs_;
};

}  // namespace rsvlm
