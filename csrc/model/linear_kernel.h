// Blocks of 32 rows of a weight times rows of x, for the instruction set of the simd header included before this file; without
// one, declarations only.
//
// For many rows a block becomes a panel first, [columns, 32] floats or [columns / 2, 32] pairs of bf16, which stays in the L2
// cache while all rows pass. Every product is one chain in order of columns, whatever the shape of the register tile.
#pragma once

#include <cstdint>

#include "rsvlm/linear.h"
#include "tile.h"

namespace rsvlm {

struct FewPart {
    const float* x;      // [tokens, stride]
    const float* block;  // float32 layout
    std::int64_t stride, tokens, blocks;
    float* out;                        // at the first block's column
    std::int64_t out_stride, present;  // columns from there to the last one
};

#define RSVLM_DECLARE_LINEAR(isa)                                            \
    namespace isa {                                                          \
    void unpack_panel(const PanelPart& part);                                \
    void multiply_panel(const TilePart& part);                               \
    void multiply_floats(const FewPart& part);                               \
    void pair_octets(const float* x, std::int64_t count, std::uint32_t* to); \
    }
RSVLM_DECLARE_LINEAR(portable)
RSVLM_DECLARE_LINEAR(avx2)
RSVLM_DECLARE_LINEAR(avx512)
RSVLM_DECLARE_LINEAR(avx512_bf16)
#undef RSVLM_DECLARE_LINEAR

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

// A register tile: 12 x 2 of 32 registers, 6 x 2 or 4 x 2 of 16.
constexpr int kTileRows = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kTileVectors = 2;
constexpr int kTileLanes = kTileVectors * kLanes;

// Gives `put(column, v, value)` all 32 columns of a group, `v` counting vectors of the block's rows.
template <class Put>
inline __attribute__((always_inline)) void decode_group(LinearKind kind, const char* group, std::int64_t v, const Put& put) {
    const std::int64_t lane = v * kLanes;
    if (kind == LinearKind::kBf16) {
        const auto* values = reinterpret_cast<const std::uint16_t*>(group);
        for (std::int64_t column = 0; column < kPanelGroup; ++column) {
            put(column, load_bf16(values + column * kPanelRows + lane));
        }
        return;
    }
    const Vec scale = load_half(reinterpret_cast<const std::uint16_t*>(group) + lane);
    const char* codes = group + kPanelRows * 2;
    if (kind == LinearKind::kInt8) {
        const auto* values = reinterpret_cast<const std::int8_t*>(codes);
        for (std::int64_t column = 0; column < kPanelGroup; ++column) {
            put(column, mul(load_int8(values + column * kPanelRows + lane), scale));
        }
        return;
    }
    for (std::int64_t octet = 0; octet < 4; ++octet) {
        Words words = load_words(codes + (octet * kPanelRows + lane) * 4);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            if (j == 5) {
                words = drop_five_codes(words);
            }
            put(octet * 8 + j, mul(code_at(words, j < 5 ? j : j - 5), scale));
        }
    }
}

inline Vec broadcast(float value) { return set1(value); }
inline Vec multiply_add(float, Vec x, Vec weight, Vec sum) { return fma(x, weight, sum); }
#ifdef RSVLM_DOT_BF16
inline Vec broadcast(std::uint32_t pair) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(pair))); }
inline Vec multiply_add(std::uint32_t, Vec x, Vec weight, Vec sum) { return dot_pairs(sum, x, weight); }
#endif

template <class Value, int Rows>
inline void run_tile(const TilePart& part, const Value* x, std::int64_t token) {
    for (std::int64_t lane = 0; lane < kPanelRows; lane += kTileLanes) {
        Vec sums[Rows][kTileVectors];
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < kTileVectors; ++v) {
                sums[r][v] = zero();
            }
        }
        const float* panel = part.panel + lane;
        for (std::int64_t k = 0; k < part.count; ++k, panel += kPanelRows) {
            const Vec low = load(panel), high = load(panel + kLanes);
#pragma GCC unroll 12
            for (int r = 0; r < Rows; ++r) {
                const Value value = x[r * part.count + k];
                const Vec lanes = broadcast(value);
                sums[r][0] = multiply_add(value, lanes, low, sums[r][0]);
                sums[r][1] = multiply_add(value, lanes, high, sums[r][1]);
            }
        }
        finish_tile<Rows>(part, token, lane, sums);
    }
}

template <class Value>
void run_tiles(const TilePart& part) {
    const auto* x = static_cast<const Value*>(part.x);
    std::int64_t token = 0;
    FetchAhead ahead(part, kTileRows);
    for (; token + kTileRows <= part.tokens; token += kTileRows) {
        ahead.share();
        run_tile<Value, kTileRows>(part, x + token * part.count, token);
    }
    ahead.share();
    for (; token + kTileRows / 2 <= part.tokens; token += kTileRows / 2) {
        run_tile<Value, kTileRows / 2>(part, x + token * part.count, token);
    }
    for (; token + 2 <= part.tokens; token += 2) {
        run_tile<Value, 2>(part, x + token * part.count, token);
    }
    for (; token < part.tokens; ++token) {
        run_tile<Value, 1>(part, x + token * part.count, token);
    }
}

// The order of sums is that of weight_matmul: four chains by column mod 4, joined every 32 columns.
template <int Tokens>
inline void few_floats(const FewPart& part, const float* block, const float* x, std::int64_t lane, float* totals) {
    constexpr int kChains = 4;
    Vec sums[Tokens];
    for (int t = 0; t < Tokens; ++t) {
        sums[t] = zero();
    }
    for (std::int64_t group = 0; group < part.stride; group += kPanelGroup) {
        Vec chains[Tokens][kChains];
        for (int t = 0; t < Tokens; ++t) {
            for (int c = 0; c < kChains; ++c) {
                chains[t][c] = zero();
            }
        }
        for (std::int64_t column = group; column < group + kPanelGroup; column += kChains) {
#pragma GCC unroll 4
            for (int c = 0; c < kChains; ++c) {
                const Vec weight = load(block + (column + c) * kPanelRows + lane);
#pragma GCC unroll 4
                for (int t = 0; t < Tokens; ++t) {
                    chains[t][c] = fma(weight, set1(x[t * part.stride + column + c]), chains[t][c]);
                }
            }
        }
        for (int t = 0; t < Tokens; ++t) {
            sums[t] = add(sums[t], add(add(chains[t][0], chains[t][1]), add(chains[t][2], chains[t][3])));
        }
    }
    for (int t = 0; t < Tokens; ++t) {
        store(totals + t * kLanes, sums[t]);
    }
}

}  // namespace

void unpack_panel(const PanelPart& part) {
    const std::int64_t scale_bytes = part.kind == LinearKind::kBf16 ? 0 : kPanelRows * 2;
    const std::int64_t bits = part.kind == LinearKind::kBf16 ? 16 : part.kind == LinearKind::kInt8 ? 8 : 4;
    const std::int64_t bytes = scale_bytes + kPanelRows * kPanelGroup * bits / 8;
    const char* group = part.block;
    for (std::int64_t g = 0; g < part.groups; ++g, group += bytes) {
#ifdef RSVLM_DOT_BF16
        float* panel = part.panel + g * kPanelGroup / 2 * kPanelRows;
        if (part.kind == LinearKind::kBf16) {
            const auto* values = reinterpret_cast<const std::uint16_t*>(group);
            for (std::int64_t pair = 0; pair < kPanelGroup / 2; ++pair) {
                for (std::int64_t lane = 0; lane < kPanelRows; lane += kLanes) {
                    const std::uint16_t* low = values + pair * 2 * kPanelRows + lane;
                    store(panel + pair * kPanelRows + lane, pair_rows(low, low + kPanelRows));
                }
            }
            continue;
        }
        for (std::int64_t v = 0; v < kPanelRows / kLanes; ++v) {
            Vec even = zero();
            decode_group(part.kind, group, v, [&](std::int64_t column, Vec value) __attribute__((always_inline)) {
                if (column % 2 == 0) {
                    even = value;
                } else {
                    store(panel + column / 2 * kPanelRows + v * kLanes, pair_bf16(even, value));
                }
            });
        }
#else
        float* panel = part.panel + g * kPanelGroup * kPanelRows;
        for (std::int64_t v = 0; v < kPanelRows / kLanes; ++v) {
            decode_group(part.kind, group, v, [&](std::int64_t column, Vec value) __attribute__((always_inline)) {
                store(panel + column * kPanelRows + v * kLanes, value);
            });
        }
#endif
    }
}

void multiply_panel(const TilePart& part) {
#ifdef RSVLM_DOT_BF16
    run_tiles<std::uint32_t>(part);
#else
    run_tiles<float>(part);
#endif
}

void multiply_floats(const FewPart& part) {
    const float* block = part.block;
    for (std::int64_t row = 0; row < part.blocks * kPanelRows; row += kPanelRows, block += part.stride * kPanelRows) {
        for (std::int64_t lane = 0; lane < kPanelRows && row + lane < part.present; lane += kLanes) {
            const std::int64_t left = part.present - row - lane, count = left < kLanes ? left : kLanes;
            for (std::int64_t token = 0; token < part.tokens;) {
                alignas(64) float totals[4 * kLanes];
                const float* x = part.x + token * part.stride;
                const std::int64_t step = part.tokens - token >= 4 ? 4 : 1;
                if (step == 4) {
                    few_floats<4>(part, block, x, lane, totals);
                } else {
                    few_floats<1>(part, block, x, lane, totals);
                }
                for (std::int64_t t = 0; t < step; ++t) {
                    store_first(part.out + (token + t) * part.out_stride + row + lane, load(totals + t * kLanes), count);
                }
                token += step;
            }
        }
    }
}

// Words 4 o + j of pairs (x[8 o + j], x[8 o + j + 4]) as bf16: what weight_matmul reads for int4 with the bf16 dot product.
void pair_octets(const float* x, std::int64_t count, std::uint32_t* to) {
#ifdef RSVLM_DOT_BF16
    const __m256i order = _mm256_set_epi8(15, 14, 7, 6, 13, 12, 5, 4, 11, 10, 3, 2, 9, 8, 1, 0, 15, 14, 7, 6, 13, 12, 5, 4, 11,
                                          10, 3, 2, 9, 8, 1, 0);
    for (std::int64_t i = 0; i < count; i += kLanes) {
        const __m256i halves = (__m256i)_mm512_cvtneps_pbh(load(x + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), _mm256_shuffle_epi8(halves, order));
    }
#else
    (void)x, (void)count, (void)to;
#endif
}

}  // namespace rsvlm::RSVLM_ISA
#endif
