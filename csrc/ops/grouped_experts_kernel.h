// Some tokens of one expert, for the instruction set of the simd header included before this file; without one, declarations
// only.
//
// Tokens are the lanes of vectors and weights are broadcast from where they lie, so no weight is packed or copied: hidden^T = W
// X^T, then out^T = W_down hidden^T, and hidden^T already lies as the second product wants it.
#pragma once

#include <cstdint>

namespace rsvlm {

struct ExpertPart {
    const void* x;                                       // [tokens, width]
    const std::int32_t* permutation;                     // the part's slots
    const float* weights;                                // [tokens * k]
    const void *w_gate, *w_up, *w_down, *b_up, *b_down;  // of this expert, null as in GroupedExperts
    float* slots;                                        // [tokens * k, width]: weighted results
    std::int64_t count, k, width, hidden;
    float* scratch;  // expert_scratch_floats(width, hidden) floats
};

constexpr std::int64_t kExpertLanes = 48;  // most tokens in one register tile: 3 vectors of 16
constexpr std::int64_t kExpertBlocks =
    2;  // tiles that share a row of weights while it is in the L1 cache; more leave the L2 cache
constexpr std::int64_t kExpertTokens = kExpertLanes * kExpertBlocks;

inline std::int64_t expert_scratch_floats(std::int64_t width, std::int64_t hidden) {
    const std::int64_t wider = width > hidden ? width : hidden;
    return kExpertTokens * (2 * width + hidden + 64) + 16 * (wider + 16);
}

#define RSVLM_DECLARE_EXPERTS(isa)                                                                                   \
    namespace isa {                                                                                                  \
    void expert_part_fp32(const ExpertPart& part);                                                                   \
    void expert_part_bf16(const ExpertPart& part);                                                                   \
    void combine_slots_fp32(const float* slots, std::int64_t tokens, std::int64_t k, std::int64_t width, void* out); \
    void combine_slots_bf16(const float* slots, std::int64_t tokens, std::int64_t k, std::int64_t width, void* out); \
    }
RSVLM_DECLARE_EXPERTS(portable)
RSVLM_DECLARE_EXPERTS(avx2)
RSVLM_DECLARE_EXPERTS(avx512)
RSVLM_DECLARE_EXPERTS(avx512_bf16)
#undef RSVLM_DECLARE_EXPERTS

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

// Up to kRows rows of a matrix of floats as the register tile reads them; a short group of rows is padded with zeros in
// scratch.
struct SingleRows {
    using Value = float;
    static constexpr int kPair = 1;
    static const float* rows(const float* matrix, std::int64_t count, std::int64_t columns, float* scratch) {
        if (count == kRows) {
            return matrix;
        }
        for (std::int64_t i = 0; i < kRows * columns; ++i) {
            scratch[i] = i < count * columns ? matrix[i] : 0.0f;
        }
        return scratch;
    }
    static const float* rows(const std::uint16_t* matrix, std::int64_t count, std::int64_t columns, float* scratch) {
        copy_as_float(matrix, count * columns, kRows * columns, scratch);  // once for all tiles of tokens
        return scratch;
    }
    template <class T, class RowOf>
    static void gather(const RowOf& row_of, std::int64_t count, std::int64_t columns, std::int64_t lanes, float* to) {
        rows_to_lanes<T>(row_of, count, columns, lanes, to);
    }
};

#ifdef RSVLM_DOT_BF16
// The same for rows of even length as pairs of bf16.
struct PairRows {
    using Value = std::uint32_t;
    static constexpr int kPair = 2;
    static const std::uint32_t* rows(const std::uint16_t* matrix, std::int64_t count, std::int64_t columns, float* scratch) {
        const auto* words = reinterpret_cast<const std::uint32_t*>(matrix);
        if (count == kRows) {
            return words;
        }
        auto* padded = reinterpret_cast<std::uint32_t*>(scratch);
        for (std::int64_t i = 0; i < kRows * columns / 2; ++i) {
            padded[i] = i < count * columns / 2 ? words[i] : 0;
        }
        return padded;
    }
    template <class T, class RowOf>
    static void gather(const RowOf& row_of, std::int64_t count, std::int64_t columns, std::int64_t lanes, float* to) {
        rows_to_lanes<float>([&](std::int64_t row) { return reinterpret_cast<const float*>(row_of(row)); }, count, columns / 2,
                             lanes, to);
    }
};
#endif

// One register tile of W X^T plus bias, [kRows, Vectors * kLanes] into `to`. Sums are closed every kChunk words: one chain over
// 1536 terms would be three times as wrong.
template <int Vectors, class T, class Value>
inline void product(const Value* weights, const T* bias, std::int64_t present, const float* lanes, std::int64_t words,
                    float* to) {
    constexpr std::int64_t kChunk = 128;
    const char* ahead = reinterpret_cast<const char*>(weights + kRows * words);  // the next rows follow in memory
    for (std::int64_t first = 0; first < words; first += kChunk) {
        const std::int64_t count = words - first < kChunk ? words - first : kChunk;
        Vec sums[kRows][Vectors];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Vectors; ++n) {
                sums[r][n] = zero();
            }
        }
        multiply_tile<kRows, Vectors>(weights + first, words, 1, lanes + first * Vectors * kLanes, count, sums,
                                      ahead + first * kRows * 4);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int n = 0; n < Vectors; ++n) {
                float* target = to + (r * Vectors + n) * kLanes;
                store(target, first == 0 ? sums[r][n] : add(load(target), sums[r][n]));
            }
        }
    }
    if (bias != nullptr) {
        for (std::int64_t r = 0; r < present; ++r) {
            const Vec shift = set1(to_float(bias[r]));
            for (int n = 0; n < Vectors; ++n) {
                float* target = to + (r * Vectors + n) * kLanes;
                store(target, add(load(target), shift));
            }
        }
    }
}

template <class T, class Value>
void product_of(int vectors, const Value* weights, const T* bias, std::int64_t present, const float* lanes, std::int64_t words,
                float* to) {
    if (vectors == 1) {
        product<1>(weights, bias, present, lanes, words, to);
    } else if (vectors == 2) {
        product<2>(weights, bias, present, lanes, words, to);
    } else {
        product<kMaxVectors>(weights, bias, present, lanes, words, to);
    }
}

// Rows `row`.. of hidden^T from the tile of up, with the tile of gate when there is one.
inline void activate(const float* gate, const float* up, bool is_gelu, std::int64_t floats, float* to) {
    for (std::int64_t i = 0; i < floats; i += kLanes) {
        Vec value = load(up + i);
        if (gate != nullptr) {
            value = mul(silu(load(gate + i)), value);
        } else if (is_gelu) {
            value = gelu(value);
        }
        store(to + i, value);
    }
}

#ifdef RSVLM_DOT_BF16
// [rows, lanes] floats in `from` -> [rows / 2, lanes] pairs.
inline void pair_up(const float* from, std::int64_t rows, std::int64_t lanes, float* to) {
    for (std::int64_t row = 0; row < rows; row += 2) {
        for (std::int64_t lane = 0; lane < lanes; lane += kLanes) {
            const Vec low = load(from + row * lanes + lane), high = load(from + (row + 1) * lanes + lane);
            store(to + row / 2 * lanes + lane, pair_bf16(low, high));
        }
    }
}
#endif

struct TokenTile {
    std::int64_t first, count;
    int vectors;
    float *x, *hidden, *out;  // transposed: [width / pair], [hidden / pair] and [width] rows of lanes
};

template <class T, class Rows>
void run_part(const ExpertPart& part) {
    constexpr int kPair = Rows::kPair;
    const T* x = static_cast<const T*>(part.x);
    const T *w_gate = static_cast<const T*>(part.w_gate), *w_up = static_cast<const T*>(part.w_up);
    const T* w_down = static_cast<const T*>(part.w_down);
    const T *b_up = static_cast<const T*>(part.b_up), *b_down = static_cast<const T*>(part.b_down);
    float gates[kRows * kMaxVectors * kLanes], ups[kRows * kMaxVectors * kLanes];
    float* free = part.scratch;
    float* rows_scratch = free;
    free += kRows * ((part.width > part.hidden ? part.width : part.hidden) + 16);
    TokenTile tiles[kExpertTokens / kLanes];
    int tile_count = 0;
    for (std::int64_t first = 0; first < part.count;) {
        const std::int64_t left = part.count - first, vectors = (left + kLanes - 1) / kLanes;
        TokenTile& tile = tiles[tile_count++];
        tile.vectors = vectors >= kMaxVectors && vectors != kMaxVectors + 1 ? kMaxVectors : vectors >= 2 ? 2 : 1;
        tile.first = first;
        tile.count = left < tile.vectors * kLanes ? left : tile.vectors * kLanes;
        const std::int64_t lanes = tile.vectors * kLanes;
        tile.x = free;
        tile.hidden = w_up == nullptr ? tile.x : tile.x + part.width / kPair * lanes;
        tile.out = tile.x + (part.width + part.hidden) / kPair * lanes;
        free = tile.out + (part.width + kRows) * lanes;
        first += tile.count;
        const std::int32_t* slots = part.permutation + tile.first;
        const std::int64_t k = part.k, width = part.width;
        Rows::template gather<T>([=](std::int64_t row) { return x + slots[row] / k * width; }, tile.count, width, lanes,
                                 tile.x);
    }
    if (w_up != nullptr) {
        for (std::int64_t row = 0; row < part.hidden; row += kRows) {
            const std::int64_t present = part.hidden - row < kRows ? part.hidden - row : kRows;
            const std::int64_t words = part.width / kPair;
            if (w_gate != nullptr) {
                // gate first: its tiles wait in `out`, which is free until the second product
                const auto* gate = Rows::rows(w_gate + row * part.width, present, part.width, rows_scratch);
                for (int t = 0; t < tile_count; ++t) {
                    product_of<T>(tiles[t].vectors, gate, static_cast<const T*>(nullptr), present, tiles[t].x, words,
                                  tile_count == 1 ? gates : tiles[t].out);
                }
            }
            const auto* up = Rows::rows(w_up + row * part.width, present, part.width, rows_scratch);
            for (int t = 0; t < tile_count; ++t) {
                const TokenTile& tile = tiles[t];
                const std::int64_t lanes = tile.vectors * kLanes;
                const float* gate = w_gate == nullptr ? nullptr : tile_count == 1 ? gates : tile.out;
                product_of<T>(tile.vectors, up, b_up == nullptr ? nullptr : b_up + row, present, tile.x, words, ups);
#ifdef RSVLM_DOT_BF16
                if (kPair == 2) {
                    activate(gate, ups, w_gate == nullptr, present * lanes, ups);
                    pair_up(ups, present, lanes, tile.hidden + row / 2 * lanes);
                    continue;
                }
#endif
                activate(gate, ups, w_gate == nullptr, present * lanes, tile.hidden + row * lanes);
            }
        }
    }
    for (std::int64_t row = 0; row < part.width; row += kRows) {
        const std::int64_t present = part.width - row < kRows ? part.width - row : kRows;
        const auto* down = Rows::rows(w_down + row * part.hidden, present, part.hidden, rows_scratch);
        for (int t = 0; t < tile_count; ++t) {
            product_of<T>(tiles[t].vectors, down, b_down == nullptr ? nullptr : b_down + row, present, tiles[t].hidden,
                          part.hidden / kPair, tiles[t].out + row * tiles[t].vectors * kLanes);
        }
    }
    for (int t = 0; t < tile_count; ++t) {
        const TokenTile& tile = tiles[t];
        const std::int32_t* slots = part.permutation + tile.first;
        float factors[kMaxVectors * kLanes];
        for (std::int64_t i = 0; i < tile.vectors * kLanes; ++i) {
            factors[i] = i < tile.count ? part.weights[slots[i]] : 0.0f;
        }
        float* results = part.slots;
        const std::int64_t width = part.width;
        lanes_to_rows<float>(tile.out, factors, tile.count, width, tile.vectors * kLanes,
                             [=](std::int64_t row) { return results + slots[row] * width; });
    }
}

template <class T>
void combine(const float* slots, std::int64_t tokens, std::int64_t k, std::int64_t width, T* out) {
    for (std::int64_t token = 0; token < tokens; ++token, slots += k * width, out += width) {
        for (std::int64_t i = 0; i < width; i += kLanes) {
            const std::int64_t present = width - i < kLanes ? width - i : kLanes;
            Vec sum = zero();
            for (std::int64_t slot = 0; slot < k; ++slot) {
                const float* from = slots + slot * width + i;
                sum = add(sum, present == kLanes ? load(from) : load_partly(from, present));
            }
            store_first(out + i, sum, present);
        }
    }
}

}  // namespace

void expert_part_fp32(const ExpertPart& part) { run_part<float, SingleRows>(part); }

void expert_part_bf16(const ExpertPart& part) {
#ifdef RSVLM_DOT_BF16
    if (part.width % 2 == 0 && part.hidden % 2 == 0) {
        run_part<std::uint16_t, PairRows>(part);
        return;
    }
#endif
    run_part<std::uint16_t, SingleRows>(part);
}

void combine_slots_fp32(const float* slots, std::int64_t tokens, std::int64_t k, std::int64_t width, void* out) {
    combine(slots, tokens, k, width, static_cast<float*>(out));
}
void combine_slots_bf16(const float* slots, std::int64_t tokens, std::int64_t k, std::int64_t width, void* out) {
    combine(slots, tokens, k, width, static_cast<std::uint16_t*>(out));
}

}  // namespace rsvlm::RSVLM_ISA
#endif
