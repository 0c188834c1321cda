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
    const void *w_gate, *w_up, *w_down, *b_up, *b_down;  // of this expert, null as in GroupedExperts
    void* slots;                                         // [tokens * k, width] of x's dtype: results before their weights
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

#define RSVLM_DECLARE_EXPERTS(isa)                                                                                            \
    namespace isa {                                                                                                           \
    void expert_part_fp32(const ExpertPart& part);                                                                            \
    void expert_part_bf16(const ExpertPart& part);                                                                            \
    /* slots [tokens * k, width] and weights [tokens * k] -> out [tokens, width] */                                           \
    void combine_slots_fp32(const void* slots, const float* weights, std::int64_t tokens, std::int64_t k, std::int64_t width, \
                            void* out);                                                                                       \
    void combine_slots_bf16(const void* slots, const float* weights, std::int64_t tokens, std::int64_t k, std::int64_t width, \
                            void* out);                                                                                       \
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

// Groups of kRows rows of weights that one tile of tokens meets before the next tile does: the tile stays in the L1 cache, the
// rows wait in L2.
constexpr int kRowGroups = 4;
constexpr std::int64_t kPrefetchBytes = 4096;

// Up to kRows rows of a matrix of floats as the register tile reads them; a short group of rows is padded with zeros in
// scratch, which is still there for the next tile of tokens: `fresh` is false then.
template <class T>
struct SingleRows {
    using Value = float;
    static constexpr int kPair = 1;
    static constexpr int kGroups = sizeof(T) == 4 ? kRowGroups : 1;  // bf16 is widened in scratch, which holds one group
    static const float* rows(const T* matrix, std::int64_t count, std::int64_t columns, bool fresh, float* scratch) {
        if (kGroups > 1 && count == kRows) {
            return reinterpret_cast<const float*>(matrix);
        }
        if (fresh) {
            copy_as_float(matrix, count * columns, kRows * columns, scratch);
        }
        return scratch;
    }
    template <class RowOf>
    static void gather(const RowOf& row_of, std::int64_t count, std::int64_t columns, std::int64_t lanes, float* to) {
        rows_to_lanes<T>(row_of, count, columns, lanes, to);
    }
};

#ifdef RSVLM_DOT_BF16
// The same for rows of even length as pairs of bf16.
struct PairRows {
    using Value = std::uint32_t;
    static constexpr int kPair = 2;
    static constexpr int kGroups = kRowGroups;
    static const std::uint32_t* rows(const std::uint16_t* matrix, std::int64_t count, std::int64_t columns, bool fresh,
                                     float* scratch) {
        const auto* words = reinterpret_cast<const std::uint32_t*>(matrix);
        if (count == kRows) {
            return words;
        }
        auto* padded = reinterpret_cast<std::uint32_t*>(scratch);
        for (std::int64_t i = 0; fresh && i < kRows * columns / 2; ++i) {
            padded[i] = i < count * columns / 2 ? words[i] : 0;
        }
        return padded;
    }
    template <class RowOf>
    static void gather(const RowOf& row_of, std::int64_t count, std::int64_t columns, std::int64_t lanes, float* to) {
        rows_to_lanes<float>([&](std::int64_t row) { return reinterpret_cast<const float*>(row_of(row)); }, count, columns / 2,
                             lanes, to);
    }
};
#endif

// One register tile of W X^T plus bias, [kRows, Vectors * kLanes] into `to`. Sums in fp32 are closed every kChunk words: one
// chain over 1536 terms would be three times as wrong. Pairs of bf16 need that less, since the result is rounded to 8 bits.
template <int Vectors, class T, class Value>
inline void product(const Value* weights, const T* bias, std::int64_t present, const float* lanes, std::int64_t words,
                    float* to) {
    constexpr std::int64_t kChunk = sizeof(T) == 4 ? 128 : 1024;
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

template <class T>
inline void prefetch(const T* row, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 64 / static_cast<std::int64_t>(sizeof(T))) {
        __builtin_prefetch(row + i, 0, 2);
    }
}

struct TokenTile {
    std::int64_t first, count;
    int vectors;
    float *x, *hidden, *out;  // transposed: [width / pair], [hidden / pair] and [width] rows of lanes
};

template <class T, class Rows>
void run_part(const ExpertPart& part) {
    constexpr int kPair = Rows::kPair;
    constexpr std::int64_t kBlock = kRows * Rows::kGroups;
    const T* x = static_cast<const T*>(part.x);
    const T *w_gate = static_cast<const T*>(part.w_gate), *w_up = static_cast<const T*>(part.w_up);
    const T* w_down = static_cast<const T*>(part.w_down);
    const T *b_up = static_cast<const T*>(part.b_up), *b_down = static_cast<const T*>(part.b_down);
    float gates[kRows * kMaxVectors * kLanes], ups[kRows * kMaxVectors * kLanes];
    float* free = part.scratch;
    const std::int64_t rows_floats = kRows * ((part.width > part.hidden ? part.width : part.hidden) + 16);
    float *gate_scratch = free, *scratch = free + rows_floats;
    free += 2 * rows_floats;
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
        for (std::int64_t row = 0; row < tile.count; ++row) {  // rows from all over x: waited for together, not one by one
            prefetch(x + slots[row] / k * width, width);
        }
        Rows::gather([=](std::int64_t row) { return x + slots[row] / k * width; }, tile.count, width, lanes, tile.x);
    }
    for (std::int64_t block = 0; w_up != nullptr && block < part.hidden; block += kBlock) {
        const std::int64_t stop = part.hidden - block < kBlock ? part.hidden : block + kBlock, words = part.width / kPair;
        for (int t = 0; t < tile_count; ++t) {
            const TokenTile& tile = tiles[t];
            const std::int64_t lanes = tile.vectors * kLanes;
            for (std::int64_t row = block; row < stop; row += kRows) {
                const std::int64_t present = stop - row < kRows ? stop - row : kRows;
                if (w_gate != nullptr) {
                    const auto* gate = Rows::rows(w_gate + row * part.width, present, part.width, t == 0, gate_scratch);
                    product_of<T>(tile.vectors, gate, static_cast<const T*>(nullptr), present, tile.x, words, gates);
                }
                const auto* up = Rows::rows(w_up + row * part.width, present, part.width, t == 0, scratch);
                product_of<T>(tile.vectors, up, b_up == nullptr ? nullptr : b_up + row, present, tile.x, words, ups);
                const float* gate = w_gate == nullptr ? nullptr : gates;
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
    T* results = static_cast<T*>(part.slots);
    for (std::int64_t block = 0; block < part.width; block += kBlock) {
        const std::int64_t stop = part.width - block < kBlock ? part.width : block + kBlock;
        for (int t = 0; t < tile_count; ++t) {
            const TokenTile& tile = tiles[t];
            for (std::int64_t row = 0; row < tile.count; ++row) {  // where the results will go, all over the slots
                prefetch(results + part.permutation[tile.first + row] * part.width + block, stop - block);
            }
            for (std::int64_t row = block; row < stop; row += kRows) {
                const std::int64_t present = stop - row < kRows ? stop - row : kRows;
                const auto* down = Rows::rows(w_down + row * part.hidden, present, part.hidden, t == 0, scratch);
                product_of<T>(tile.vectors, down, b_down == nullptr ? nullptr : b_down + row, present, tile.hidden,
                              part.hidden / kPair, tile.out + row * tile.vectors * kLanes);
            }
        }
    }
    float ones[kMaxVectors * kLanes];
    for (float& one : ones) {
        one = 1.0f;
    }
    for (int t = 0; t < tile_count; ++t) {
        const TokenTile& tile = tiles[t];
        const std::int32_t* slots = part.permutation + tile.first;
        const std::int64_t width = part.width;
        lanes_to_rows<T>(tile.out, ones, tile.count, width, tile.vectors * kLanes,
                         [=](std::int64_t row) { return results + slots[row] * width; });
    }
}

template <class T>
void combine(const T* slots, const float* weights, std::int64_t tokens, std::int64_t k, std::int64_t width, T* out) {
    for (std::int64_t token = 0; token < tokens; ++token, slots += k * width, weights += k, out += width) {
        for (std::int64_t i = 0; i < width; i += kLanes) {
            const std::int64_t present = width - i < kLanes ? width - i : kLanes;
            Vec sum = zero();
            for (std::int64_t slot = 0; slot < k; ++slot) {
                const T* from = slots + slot * width + i;
                __builtin_prefetch(from + kPrefetchBytes / sizeof(T));  // the hardware's prefetcher stops at the end of a page
                const Vec value = present == kLanes ? load_float(from) : load_partly(from, present);
                sum = add(sum, mul(value, set1(weights[slot])));
            }
            store_first(out + i, sum, present);
        }
    }
}

}  // namespace

void expert_part_fp32(const ExpertPart& part) { run_part<float, SingleRows<float>>(part); }

void expert_part_bf16(const ExpertPart& part) {
#ifdef RSVLM_DOT_BF16
    if (part.width % 2 == 0 && part.hidden % 2 == 0) {
        run_part<std::uint16_t, PairRows>(part);
        return;
    }
#endif
    run_part<std::uint16_t, SingleRows<std::uint16_t>>(part);
}

void combine_slots_fp32(const void* slots, const float* weights, std::int64_t tokens, std::int64_t k, std::int64_t width,
                        void* out) {
    combine(static_cast<const float*>(slots), weights, tokens, k, width, static_cast<float*>(out));
}
void combine_slots_bf16(const void* slots, const float* weights, std::int64_t tokens, std::int64_t k, std::int64_t width,
                        void* out) {
    combine(static_cast<const std::uint16_t*>(slots), weights, tokens, k, width, static_cast<std::uint16_t*>(out));
}

}  // namespace rsvlm::RSVLM_ISA
#endif
