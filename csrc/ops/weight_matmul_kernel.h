// Blocks of 32 rows of a weight times up to kTokens rows of x, for the instruction set of the simd header included before this
// file; without one, the layout and declarations only.
//
// Rows of the weight are the lanes, values of x are broadcast. Inside a group of 32 columns four chains run (column mod 4),
// then total += scale * ((c0 + c1) + (c2 + c3)): the same order for any number of tokens, so that a row alone and in a batch
// agrees.
#pragma once

#include <cstdint>

#include "rsvlm/weight_matmul.h"

namespace rsvlm {

constexpr std::int64_t kWeightRows = 32;   // rows of a block
constexpr std::int64_t kWeightGroup = 32;  // columns that share a scale

// A group of a block lies as: 32 scales (none for bf16), then
//   bf16: per column 32 values; int8: per column 32 codes; int4: per 8 columns 32 words, a row's 8 codes from the low bits up.
inline std::int64_t weight_scale_bytes(const WeightShape& shape) {
    return shape.kind == WeightKind::kBf16 ? 0 : kWeightRows * (shape.wide_scales ? 4 : 2);
}
inline std::int64_t weight_group_bytes(const WeightShape& shape) {
    const std::int64_t bits = shape.kind == WeightKind::kBf16 ? 16 : shape.kind == WeightKind::kInt8 ? 8 : 4;
    return weight_scale_bytes(shape) + kWeightRows * kWeightGroup * bits / 8;
}

struct WeightPart {
    WeightShape shape;
    const char* layout;  // first block of the part
    // [tokens, padded columns] with zeros behind the last column. For avx512_bf16, which has int4 only: [tokens, columns / 2]
    // pairs, word 4 o + j holds columns 8 o + j (low half) and 8 o + j + 4.
    const float* x;
    std::int64_t tokens, groups;       // at most 8 tokens; groups of a block
    std::int64_t first_row, stop_row;  // of the weight; first_row a multiple of 32
    void* out;                         // [tokens, rows]
    Element element;
};

#define RSVLM_DECLARE_WEIGHT_MATMUL(isa)             \
    namespace isa {                                  \
    void weight_matmul_part(const WeightPart& part); \
    }
RSVLM_DECLARE_WEIGHT_MATMUL(portable)
RSVLM_DECLARE_WEIGHT_MATMUL(avx2)
RSVLM_DECLARE_WEIGHT_MATMUL(avx512)
RSVLM_DECLARE_WEIGHT_MATMUL(avx512_bf16)
#undef RSVLM_DECLARE_WEIGHT_MATMUL

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

constexpr int kTokens = kLanes == 16 ? 4 : 2;  // rows of x in registers; four chains for each
constexpr int kChains = 4;
constexpr std::int64_t kPrefetchBytes = 8192;

// Whether x comes as pairs of bf16 instead of floats.
constexpr bool paired(WeightKind kind) {
#ifdef RSVLM_DOT_BF16
    return kind == WeightKind::kInt4;
#else
    return (void)kind, false;
#endif
}

// `Tokens` rows of x, `Vectors` vectors of the block's rows from lane `lane` on.
template <WeightKind Kind, int Tokens, int Vectors>
inline void add_group(const char* group, std::int64_t scale_bytes, const float* x, std::int64_t stride, std::int64_t lane,
                      float* totals) {
    Vec chains[Tokens][Vectors][kChains];
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 4
            for (int c = 0; c < kChains; ++c) {
                chains[t][v][c] = zero();
            }
        }
    }
    const char* codes = group + scale_bytes;
#ifdef RSVLM_DOT_BF16
    if (Kind == WeightKind::kInt4) {  // 4-bit codes are exact in bf16, x is bf16, and the dot product sums in fp32
        const auto* pairs = reinterpret_cast<const std::uint32_t*>(x);
        for (int octet = 0; octet < 4; ++octet) {
            Words words[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                words[v] = load_words(codes + (octet * kWeightRows + lane + v * kLanes) * 4);
            }
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) {
                    const Vec weight = code_pair(words[v], j);
#pragma GCC unroll 4
                    for (int t = 0; t < Tokens; ++t) {
                        const auto pair = static_cast<int>(pairs[t * stride + octet * 4 + j]);
                        const Vec value = _mm512_castsi512_ps(_mm512_set1_epi32(pair));
                        chains[t][v][j] = dot_pairs(chains[t][v][j], weight, value);
                    }
                }
            }
        }
    } else
#endif
        if (Kind == WeightKind::kInt4) {
        for (int octet = 0; octet < 4; ++octet) {
            Words words[Vectors];
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) {
                words[v] = load_words(codes + (octet * kWeightRows + lane + v * kLanes) * 4);
            }
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) {
                    if (j == 5) {
                        words[v] = drop_five_codes(words[v]);
                    }
                    const Vec weight = code_at(words[v], j < 5 ? j : j - 5);
#pragma GCC unroll 4
                    for (int t = 0; t < Tokens; ++t) {
                        Vec& chain = chains[t][v][j % kChains];
                        chain = fma(weight, set1(x[t * stride + octet * 8 + j]), chain);
                    }
                }
            }
        }
    } else {
        for (int column = 0; column < kWeightGroup; column += kChains) {
#pragma GCC unroll 4
            for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
                for (int v = 0; v < Vectors; ++v) {
                    const std::int64_t at = (column + c) * kWeightRows + lane + v * kLanes;
                    const Vec weight = Kind == WeightKind::kInt8
                                           ? load_int8(reinterpret_cast<const std::int8_t*>(codes) + at)
                                           : load_bf16(reinterpret_cast<const std::uint16_t*>(codes) + at);
#pragma GCC unroll 4
                    for (int t = 0; t < Tokens; ++t) {
                        chains[t][v][c] = fma(weight, set1(x[t * stride + column + c]), chains[t][v][c]);
                    }
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
        Vec scale = set1(1.0f);
        if (scale_bytes == kWeightRows * 2) {
            scale = load_half(reinterpret_cast<const std::uint16_t*>(group) + lane + v * kLanes);
        } else if (scale_bytes != 0) {
            scale = load(reinterpret_cast<const float*>(group) + lane + v * kLanes);
        }
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
            const Vec(&c)[kChains] = chains[t][v];
            float* total = totals + t * kWeightRows + lane + v * kLanes;
            store(total, fma(scale, add(add(c[0], c[1]), add(c[2], c[3])), load(total)));
        }
    }
}

template <WeightKind Kind, int Tokens>
void run_block(const WeightPart& part, const char* block, const float* x, float* totals) {
    constexpr int kVectors = Tokens * 2 <= kTokens || Tokens == 1 ? 2 : 1;
    const std::int64_t bytes = weight_group_bytes(part.shape), scale_bytes = weight_scale_bytes(part.shape);
    const std::int64_t stride = part.groups * kWeightGroup / (paired(Kind) ? 2 : 1);
    for (std::int64_t group = 0; group < part.groups; ++group, block += bytes) {
        for (std::int64_t line = 0; line < bytes; line += 64) {  // the hardware's prefetcher stops at the end of a page
            __builtin_prefetch(block + kPrefetchBytes + line);
        }
        for (std::int64_t lane = 0; lane < kWeightRows; lane += kVectors * kLanes) {
            add_group<Kind, Tokens, kVectors>(block, scale_bytes, x + group * kWeightGroup / (paired(Kind) ? 2 : 1), stride,
                                              lane, totals);
        }
    }
}

template <WeightKind Kind>
void run_kind(const WeightPart& part) {
    const std::int64_t block_bytes = weight_group_bytes(part.shape) * part.groups;
    const char* block = part.layout;
    for (std::int64_t row = part.first_row; row < part.stop_row; row += kWeightRows, block += block_bytes) {
        for (std::int64_t token = 0; token < part.tokens;) {
            const std::int64_t left = part.tokens - token;
            const float* x = part.x + token * part.groups * kWeightGroup / (paired(Kind) ? 2 : 1);
            alignas(64) float totals[kTokens * kWeightRows] = {};
            std::int64_t count = left < kTokens ? left : kTokens;
            if (count == 1) {
                run_block<Kind, 1>(part, block, x, totals);
            } else if (count == 2) {
                run_block<Kind, 2>(part, block, x, totals);
            } else if (count == 3) {
                run_block<Kind, kTokens == 2 ? 1 : 3>(part, block, x, totals);
            } else {
                run_block<Kind, kTokens == 2 ? 1 : 4>(part, block, x, totals);
            }
            const std::int64_t present = part.stop_row - row < kWeightRows ? part.stop_row - row : kWeightRows;
            for (std::int64_t t = 0; t < count; ++t) {
                const std::int64_t at = (token + t) * part.shape.rows + row;
                for (std::int64_t lane = 0; lane < present; lane += kLanes) {
                    const Vec value = load(totals + t * kWeightRows + lane);
                    const std::int64_t width = present - lane < kLanes ? present - lane : kLanes;
                    if (part.element == Element::kBfloat16) {
                        store_first(static_cast<std::uint16_t*>(part.out) + at + lane, value, width);
                    } else {
                        store_first(static_cast<float*>(part.out) + at + lane, value, width);
                    }
                }
            }
            token += count;
        }
    }
}

}  // namespace

void weight_matmul_part(const WeightPart& part) {
    if (part.shape.kind == WeightKind::kInt4) {
        run_kind<WeightKind::kInt4>(part);
    } else if (part.shape.kind == WeightKind::kInt8) {
        run_kind<WeightKind::kInt8>(part);
    } else {
        run_kind<WeightKind::kBf16>(part);
    }
}

}  // namespace rsvlm::RSVLM_ISA
#endif
