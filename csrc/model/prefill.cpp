// Decoder::prefill: many rows of prompts at once, as products of matrices.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../ops/attention_kernels.h"
#include "rows.h"
#include "rsvlm/decoder.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr std::int64_t kAttentionPiece = 96;  // queries that share one copy of keys and values
constexpr std::int64_t kRowsAtOnce = 480;     // keeps all activations of the default model at 5 MB

std::int64_t element_bytes(Element element) { return element == Element::kBfloat16 ? 2 : 4; }

// Neighbouring new tokens of one cache row; `first` counts them in the batch.
struct Piece {
    std::int64_t row, position, tokens, first;
};

}  // namespace

void Decoder::prefill(KvCache& cache, const PrefillRow* rows, std::int64_t count, const float* embeddings, float* states) {
    const std::lock_guard<std::mutex> lock(busy_);
    for (std::int64_t i = 0; i < count; ++i) {
        check_rows(cache, rows[i].row, rows[i].position, rows[i].tokens);
    }
    std::vector<PrefillRow> batch;
    std::vector<float> batch_states;
    const std::int64_t hidden = shape_.hidden;
    std::int64_t held = 0, first = 0;  // `first` is the state that the batch's first row belongs to
    const auto flush = [&](std::int64_t next) {
        if (held > 0) {
            float* x = prompt_x_.hold<float>(held * hidden);
            std::copy_n(embeddings, held * hidden, x);
            embeddings += held * hidden;
            batch_states.resize(batch.size() * static_cast<std::size_t>(hidden));
            prefill_rows(cache, batch.data(), static_cast<std::int64_t>(batch.size()), x, batch_states.data());
            // a row that goes on leaves a state, which the next piece of it overwrites
            std::copy(batch_states.begin(), batch_states.end(), states + first * hidden);
        }
        batch.clear();
        held = 0;
        first = next;
    };
    for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t done = 0; done < rows[i].tokens;) {
            const std::int64_t tokens = std::min(rows[i].tokens - done, kRowsAtOnce - held);
            batch.push_back({rows[i].row, rows[i].position + done, tokens});
            held += tokens;
            done += tokens;
            if (held == kRowsAtOnce) {
                flush(done < rows[i].tokens ? i : i + 1);
            }
        }
    }
    flush(count);
}

void Decoder::prefill_rows(KvCache& cache, const PrefillRow* rows, std::int64_t count, float* x, float* states) {
    const std::int64_t hidden = shape_.hidden, dim = shape_.head_dim, half = dim / 2, heads = shape_.heads;
    const std::int64_t kv_heads = shape_.kv_heads, group = heads / kv_heads, group_width = heads * dim;
    std::int64_t tokens = 0, longest = 0;
    std::vector<std::int64_t> positions, cache_rows;
    std::vector<Piece> pieces;
    for (std::int64_t i = 0; i < count; ++i) {
        tokens += rows[i].tokens;
        longest = std::max(longest, rows[i].position + rows[i].tokens);
        for (std::int64_t n = 0; n < rows[i].tokens; n += kAttentionPiece) {
            pieces.push_back({rows[i].row, rows[i].position + n, std::min(kAttentionPiece, rows[i].tokens - n),
                              tokens - rows[i].tokens + n});
        }
        for (std::int64_t n = 0; n < rows[i].tokens; ++n) {
            positions.push_back(rows[i].position + n);
            cache_rows.push_back(rows[i].row);
        }
    }
    // the longest first, so that the last thread to finish holds a short one
    std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) { return a.position > b.position; });
    const auto attention_floats = static_cast<std::size_t>(attention_scratch_floats(longest, dim));
    const RowKernels kernels = row_kernels();
    const auto attend = attention_kernel(shape_.cache);
    const int threads = num_threads();
    const std::int64_t cache_bytes = element_bytes(shape_.cache);
    const Layer& one = layers_[0];  // all layers have its widths, and no operand is wider than float32
    const std::int64_t widest = std::max(one.qkv.columns, one.o.columns);
    char* inputs = inputs_.hold<char>(tokens * operand_row_bytes(Operand::kFloat32, widest));
    char* gated = gated_inputs_.hold<char>(tokens * operand_row_bytes(Operand::kFloat32, one.down.columns));
    char* queries = queries_.hold<char>(tokens * group_width * cache_bytes);
    char* outputs = outputs_.hold<char>(tokens * group_width * cache_bytes);
    float* qkv = prompt_qkv_.hold<float>(tokens * one.qkv.rows);
    std::vector<float> cosines(static_cast<std::size_t>(tokens * half)), sines(static_cast<std::size_t>(tokens * half));
    for (std::int64_t n = 0; n < tokens; ++n) {
        turn(positions[static_cast<std::size_t>(n)], cosines.data() + n * half, sines.data() + n * half);
    }
    // Rows of x for a product with `linear`, 16 at a time: make(token, buffer of a row's floats) gives the floats.
    const auto write_rows = [&](const Linear& linear, const auto& make) {
        const Operand operand = operand_of(linear);
        const std::int64_t bytes = operand_row_bytes(operand, linear.columns);
        const auto floats = static_cast<std::size_t>(padded_columns(linear.columns));
        for_each_part((tokens + 15) / 16, threads, floats, [&](std::int64_t part, float* row) {
            for (std::int64_t n = part * 16; n < std::min(part * 16 + 16, tokens); ++n) {
                make(n, row);
                write_operand_row(operand, row, linear.columns, inputs + n * bytes);
            }
        });
    };
    const auto norm_rows = [&](const Linear& linear, const float* weight) {
        write_rows(linear, [&](std::int64_t n, float* row) {
            kernels.norm({x + n * hidden, weight, nullptr, hidden, shape_.eps, row, Element::kFloat32});
        });
    };
    const auto multiply = [&](const Linear& linear, const char* from, float* out, bool add) {
        multiply_many(linear, {from, operand_of(linear), tokens, threads}, {out, linear.rows, add});
    };
    for (std::int64_t index = 0; index < shape_.layers; ++index) {
        const Layer& layer = layers_[static_cast<std::size_t>(index)];
        const std::int64_t qkv_width = layer.qkv.rows;
        norm_rows(layer.qkv, layer.input_norm);
        multiply(layer.qkv, inputs, qkv, false);
        for_each_part((tokens + 15) / 16, threads, 0, [&](std::int64_t part, float*) {
            for (std::int64_t n = part * 16; n < std::min(part * 16 + 16, tokens); ++n) {
                const float* row = qkv + n * qkv_width;
                const std::int64_t place = positions[static_cast<std::size_t>(n)];
                const std::int64_t cache_row = cache_rows[static_cast<std::size_t>(n)];
                for (std::int64_t head = 0; head < heads; ++head) {
                    kernels.rotate(row + head * dim, cosines.data() + n * half, sines.data() + n * half, half, shape_.cache,
                                   queries + (n * heads + head) * dim * cache_bytes);
                }
                for (std::int64_t head = 0; head < kv_heads; ++head) {
                    const float* key = row + (heads + head) * dim;
                    kernels.rotate(key, cosines.data() + n * half, sines.data() + n * half, half, shape_.cache,
                                   cache.key(index, cache_row, head, place));
                    kernels.convert(key + kv_heads * dim, dim, shape_.cache, cache.value(index, cache_row, head, place));
                }
            }
        });
        for_each_part(
            static_cast<std::int64_t>(pieces.size()) * heads, threads, attention_floats,
            [&](std::int64_t part, float* scratch) {
                const Piece& piece = pieces[static_cast<std::size_t>(part / heads)];
                const std::int64_t head = part % heads, keys = piece.position + piece.tokens;
                float limits[kAttentionPiece];
                for (std::int64_t n = 0; n < piece.tokens; ++n) {
                    limits[n] = static_cast<float>(piece.position + n + 1);
                }
                const std::int64_t at = (piece.first * heads + head) * dim * cache_bytes;
                attend({queries + at, cache.key(index, piece.row, head / group, 0),
                        cache.value(index, piece.row, head / group, 0), outputs + at, group_width, dim, dim, group_width,
                        piece.tokens, keys, dim, kLog2E / std::sqrt(static_cast<float>(dim)), scratch, limits});
            });
        write_rows(layer.o, [&](std::int64_t n, float* row) {
            const char* from = outputs + n * group_width * cache_bytes;
            if (shape_.cache == Element::kFloat32) {
                std::memcpy(row, from, static_cast<std::size_t>(group_width * cache_bytes));
            } else {
                kernels.widen(reinterpret_cast<const std::uint16_t*>(from), group_width, row);
            }
        });
        multiply(layer.o, inputs, x, true);
        norm_rows(layer.gate_up, layer.post_norm);
        const Operand operand = operand_of(layer.down);
        const std::int64_t down_bytes = operand_row_bytes(operand, layer.down.columns);
        // a block of 32 gates and one of their 32 ups lie side by side
        multiply_into(layer.gate_up, {inputs, operand_of(layer.gate_up), tokens, threads}, 2, [&](const Products& products) {
            kernels.gate_block(products.sums, products.tokens, products.sums);
            write_operand_columns(operand, products.sums, products.tokens, products.column / 2, layer.down.columns,
                                  gated + products.token * down_bytes);
        });
        multiply(layer.down, gated, x, true);
    }
    std::int64_t last = -1;
    for (std::int64_t i = 0; i < count; ++i) {
        last += rows[i].tokens;
        kernels.norm({x + last * hidden, norm_, nullptr, hidden, shape_.eps, states + i * hidden, Element::kFloat32});
    }
}

}  // namespace rsvlm
