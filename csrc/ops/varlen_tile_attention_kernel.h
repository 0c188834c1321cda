// One (tile, head, range of queries) of varlen_tile_attention, for the instruction set of the simd header included before this
// file; without one, declarations only.
//
// Queries are the lanes of vectors, keys and features are broadcast: scores^T = K Q^T, then out^T += V^T P^T. So the softmax
// over keys runs down vectors without a horizontal step, any head_dim fills its registers, and K and V are copied, never
// transposed.
#pragma once

#include <cstdint>

namespace rsvlm {

struct AttentionPart {
    const void* q;  // first query of the part, at its head
    const void* k;  // first key of the tile, at its head
    const void* v;
    void* out;
    std::int64_t q_row_stride, k_row_stride, v_row_stride, out_row_stride;  // in elements
    std::int64_t queries, keys, head_dim;
    float scale;                    // log2(e) included
    float* scratch;                 // attention_scratch_floats(keys, head_dim) floats
    const float* limits = nullptr;  // how many keys each query may see (a prompt's causal mask); null = all of them
};

constexpr std::int64_t kAttentionLanes = 48;  // most queries in flight: 3 vectors of 16
constexpr std::int64_t kAttentionKeyBlock =
    64;  // 64 keys x 48 queries of scores are 12 KiB, next to 16 KiB of V in the L1 cache

inline std::int64_t attention_scratch_floats(std::int64_t keys, std::int64_t head_dim) {
    const std::int64_t padded_keys = keys + 16, padded_dim = head_dim + 16;
    return padded_keys * padded_dim * 2 + kAttentionLanes * (2 * padded_dim + 2 * kAttentionKeyBlock + 8);
}

#define RSVLM_DECLARE_ATTENTION(isa)                     \
    namespace isa {                                      \
    void attention_part_fp32(const AttentionPart& part); \
    void attention_part_bf16(const AttentionPart& part); \
    }
RSVLM_DECLARE_ATTENTION(portable)
RSVLM_DECLARE_ATTENTION(avx2)
RSVLM_DECLARE_ATTENTION(avx512)
RSVLM_DECLARE_ATTENTION(avx512_bf16)
#undef RSVLM_DECLARE_ATTENTION

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// How operands lie in scratch when products are taken in fp32, whatever the input is.
template <class T>
struct SingleOperands {
    using Value = float;
    static constexpr int kPair = 1;  // neighbours in the reduction that share a word

    static void pack_keys(const T* k, std::int64_t stride, std::int64_t keys, std::int64_t dim, float* to) {
        for (std::int64_t key = 0; key < keys; ++key) {
            copy_as_float(k + key * stride, dim, dim, to + key * dim);
        }
        for (std::int64_t i = keys * dim; i < round_up(keys, kRows) * dim; ++i) {
            to[i] = 0.0f;
        }
    }
    static void pack_values(const T* v, std::int64_t stride, std::int64_t keys, std::int64_t dim, std::int64_t padded,
                            float* to) {
        for (std::int64_t key = 0; key < keys; ++key) {
            copy_as_float(v + key * stride, dim, padded, to + key * padded);
        }
    }
    static void pack_queries(const T* q, std::int64_t stride, std::int64_t queries, std::int64_t dim, std::int64_t lanes,
                             float* to) {
        rows_to_lanes<T>([=](std::int64_t row) { return q + row * stride; }, queries, dim, lanes, to);
    }
};

#ifdef RSVLM_DOT_BF16
// The same for the bf16 dot product: pairs of features for scores, pairs of keys for outputs. dim must be even.
struct PairOperands {
    using Value = std::uint32_t;
    static constexpr int kPair = 2;

    static void pack_keys(const std::uint16_t* k, std::int64_t stride, std::int64_t keys, std::int64_t dim, std::uint32_t* to) {
        const std::int64_t words = dim / 2;
        for (std::int64_t key = 0; key < keys; ++key) {
            std::memcpy(to + key * words, k + key * stride, static_cast<std::size_t>(dim) * 2);
        }
        for (std::int64_t i = keys * words; i < round_up(keys, kRows) * words; ++i) {
            to[i] = 0;
        }
    }
    static void pack_values(const std::uint16_t* v, std::int64_t stride, std::int64_t keys, std::int64_t dim,
                            std::int64_t padded, std::uint32_t* to) {
        for (std::int64_t key = 0; key < keys; key += 2, to += padded) {
            const std::uint16_t* first = v + key * stride;
            const bool paired = key + 1 < keys;
            const std::uint16_t* second = paired ? first + stride : first;
            std::int64_t i = 0;
            for (; paired && i + kLanes <= dim; i += kLanes) {
                store(reinterpret_cast<float*>(to + i), pair_rows(first + i, second + i));
            }
            for (; i < dim; ++i) {
                to[i] = first[i] | (paired ? static_cast<std::uint32_t>(second[i]) << 16 : 0);
            }
            for (; i < padded; ++i) {
                to[i] = 0;
            }
        }
    }
    static void pack_queries(const std::uint16_t* q, std::int64_t stride, std::int64_t queries, std::int64_t dim,
                             std::int64_t lanes, float* to) {
        // a pair is one 32-bit word of the row, and a transpose of words does not look inside
        rows_to_lanes<float>([=](std::int64_t row) { return reinterpret_cast<const float*>(q + row * stride); }, queries,
                             dim / 2, lanes, to);
    }
};
#endif

// Weights of one block of keys, in place of scores: p = 2^(score - maximum), added to `sum`.
template <int Vectors, class T>
inline void exponentiate(const float* scores, std::int64_t keys, const Vec (&maximum)[Vectors], Vec (&sum)[Vectors], float* to,
                         SingleOperands<T>*) {
    for (std::int64_t i = 0; i < keys; ++i) {
        for (int n = 0; n < Vectors; ++n) {
            const std::int64_t at = (i * Vectors + n) * kLanes;
            const Vec weight = exp2(sub(load(scores + at), maximum[n]));
            sum[n] = add(sum[n], weight);
            store(to + at, weight);
        }
    }
}

#ifdef RSVLM_DOT_BF16
template <int Vectors>
inline void exponentiate(const float* scores, std::int64_t keys, const Vec (&maximum)[Vectors], Vec (&sum)[Vectors], float* to,
                         PairOperands*) {
    for (std::int64_t i = 0; i < keys; i += 2) {
        for (int n = 0; n < Vectors; ++n) {
            const std::int64_t at = (i * Vectors + n) * kLanes;
            const Vec low = exp2(sub(load(scores + at), maximum[n]));
            const Vec high = i + 1 < keys ? exp2(sub(load(scores + at + Vectors * kLanes), maximum[n])) : zero();
            sum[n] = add(sum[n], add(low, high));
            store(to + (i / 2 * Vectors + n) * kLanes, pair_bf16(low, high));
        }
    }
}
#endif

// Sets scores of keys beyond each query's limit to -infinity, and `largest` to what is left, starting from `before`.
template <int Vectors>
inline void hide_keys(const float* limits, std::int64_t first, std::int64_t keys, float* scores, Vec (&largest)[Vectors],
                      const Vec (&before)[Vectors]) {
    for (int n = 0; n < Vectors; ++n) {
        largest[n] = before[n];
        const Vec limit = load(limits + n * kLanes);
        for (std::int64_t i = 0; i < keys; ++i) {
            float* at = scores + (i * Vectors + n) * kLanes;
            const Vec score = select_greater(limit, set1(static_cast<float>(first + i)), load(at), set1(-__builtin_inff()));
            store(at, score);
            largest[n] = max(score, largest[n]);
        }
    }
}

template <class T, class Operands, int Vectors>
void attend(const AttentionPart& part, std::int64_t first, std::int64_t queries, const typename Operands::Value* keys,
            const typename Operands::Value* values, float* scratch) {
    constexpr std::int64_t kWidth = Vectors * kLanes;
    constexpr int kPair = Operands::kPair;
    const std::int64_t dim = part.head_dim, padded = round_up(dim, kRows), words = dim / kPair;
    float* lanes = scratch;                       // [dim / pair, width] queries
    float* outputs = lanes + (dim + 1) * kWidth;  // [padded, width]
    float* scores = outputs + padded * kWidth;    // [key block, width]
    float* weights = scores + (kAttentionKeyBlock + kRows) * kWidth;
    const T* q = static_cast<const T*>(part.q) + first * part.q_row_stride;
    Operands::pack_queries(q, part.q_row_stride, queries, dim, kWidth, lanes);
    const Vec scale = set1(part.scale);
    float limits[kWidth];
    for (std::int64_t i = 0; part.limits != nullptr && i < kWidth; ++i) {
        limits[i] = i < queries ? part.limits[first + i] : 1.0f;
    }
    Vec maximum[Vectors], sum[Vectors];
    for (int n = 0; n < Vectors; ++n) {
        maximum[n] = set1(-__builtin_inff());
        sum[n] = zero();
    }
    for (std::int64_t key = 0; key < part.keys; key += kAttentionKeyBlock) {
        const std::int64_t count = part.keys - key < kAttentionKeyBlock ? part.keys - key : kAttentionKeyBlock;
        Vec largest[Vectors], factor[Vectors], base[Vectors];
        for (int n = 0; n < Vectors; ++n) {
            largest[n] = maximum[n];
        }
        for (std::int64_t i = 0; i < count; i += kRows) {
            Vec sums[kRows][Vectors];
            for (int r = 0; r < kRows; ++r) {
                for (int n = 0; n < Vectors; ++n) {
                    sums[r][n] = zero();
                }
            }
            multiply_tile<kRows, Vectors>(keys + (key + i) * words, words, 1, lanes, words, sums);
            const std::int64_t present = count - i;  // padded keys are stored behind the block and never looked at
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int n = 0; n < Vectors; ++n) {
                    const Vec score = mul(sums[r][n], scale);
                    store(scores + ((i + r) * Vectors + n) * kLanes, score);
                    largest[n] = r < present ? max(score, largest[n]) : largest[n];
                }
            }
        }
        if (part.limits != nullptr) {
            hide_keys<Vectors>(limits, key, count, scores, largest, maximum);
        }
        for (int n = 0; n < Vectors; ++n) {
            // all scores -infinity so far: subtract 0, so that a later finite score still counts and none gives 0 / 0 = NaN
            base[n] = zero_where_minus_infinity(largest[n]);
            factor[n] = exp2(sub(maximum[n], base[n]));
            maximum[n] = largest[n];
            sum[n] = mul(sum[n], factor[n]);
        }
        exponentiate<Vectors>(scores, count, base, sum, weights, static_cast<Operands*>(nullptr));
        const auto* block_values = values + key / kPair * padded;
        for (std::int64_t d = 0; d < padded; d += kRows) {
            Vec sums[kRows][Vectors];
            float* target = outputs + d * kWidth;
            for (int r = 0; r < kRows; ++r) {
                for (int n = 0; n < Vectors; ++n) {
                    sums[r][n] = zero();
                }
            }
            multiply_tile<kRows, Vectors>(block_values + d, 1, padded, weights, (count + kPair - 1) / kPair, sums);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int n = 0; n < Vectors; ++n) {
                    float* to = target + (r * Vectors + n) * kLanes;
                    store(to, key == 0 ? sums[r][n] : fma(load(to), factor[n], sums[r][n]));
                }
            }
        }
    }
    for (int n = 0; n < Vectors; ++n) {
        store(scores + n * kLanes, div(set1(1.0f), sum[n]));
    }
    T* out = static_cast<T*>(part.out) + first * part.out_row_stride;
    const std::int64_t stride = part.out_row_stride;
    lanes_to_rows<T>(outputs, scores, queries, dim, kWidth, [=](std::int64_t row) { return out + row * stride; });
}

template <class T, class Operands>
void run_part(const AttentionPart& part) {
    using Value = typename Operands::Value;
    const std::int64_t dim = part.head_dim, padded = round_up(dim, kRows);
    auto* keys = reinterpret_cast<Value*>(part.scratch);
    Value* values = keys + (part.keys + kRows) * dim / Operands::kPair;
    float* rest = part.scratch + (part.keys + 16) * (dim + 16) * 2;
    Operands::pack_keys(static_cast<const T*>(part.k), part.k_row_stride, part.keys, dim, keys);
    Operands::pack_values(static_cast<const T*>(part.v), part.v_row_stride, part.keys, dim, padded, values);
    for (std::int64_t first = 0; first < part.queries;) {
        const std::int64_t left = part.queries - first;
        const std::int64_t vectors = (left + kLanes - 1) / kLanes;
        if (vectors >= kMaxVectors && vectors != kMaxVectors + 1) {
            const std::int64_t count = left < kMaxVectors * kLanes ? left : kMaxVectors * kLanes;
            attend<T, Operands, kMaxVectors>(part, first, count, keys, values, rest);
            first += count;
        } else if (vectors >= 2) {  // four vectors are two and two: one alone leaves the multipliers waiting
            const std::int64_t count = left < 2 * kLanes ? left : 2 * kLanes;
            attend<T, Operands, 2>(part, first, count, keys, values, rest);
            first += count;
        } else {
            attend<T, Operands, 1>(part, first, left, keys, values, rest);
            first += left;
        }
    }
}

}  // namespace

void attention_part_fp32(const AttentionPart& part) { run_part<float, SingleOperands<float>>(part); }

void attention_part_bf16(const AttentionPart& part) {
#ifdef RSVLM_DOT_BF16
    if (part.head_dim % 2 == 0) {
        run_part<std::uint16_t, PairOperands>(part);
        return;
    }
#endif
    run_part<std::uint16_t, SingleOperands<std::uint16_t>>(part);
}

}  // namespace rsvlm::RSVLM_ISA
#endif
