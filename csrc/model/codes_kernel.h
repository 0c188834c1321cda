// Blocks of 32 rows of an int8 or int4 weight times rows of x that are rounded to int8, for the instruction set of the simd
// header included before this file; without one, layouts and declarations only.
//
// A group of 32 columns is summed in integers, which is exact, then total += sum * (scale of the weight * scale of x) in order
// of groups: the same for one row and for many, and every instruction set rounds x to the same codes.
#pragma once

#include <cstdint>

#include "rsvlm/linear.h"
#include "tile.h"

namespace rsvlm {

// Bits of the float 1.5 * 2^23: an integer below 2^22 in magnitude that is added to them gives the float that is greater by it,
// so that subtracting 1.5 * 2^23 makes it a float, on units that are idle where a conversion is not.
constexpr std::int32_t kFloatBits = 0x4b400000;
constexpr float kFloatOffset = 12582912.0f;

// A row of x lies in groups of 32 columns. `start` = kFloatBits - offset * sum of the codes, because a weight's codes are read
// as unsigned, 8 (int4) or 128 (int8) above what they stand for. For int4 the columns of each octet lie as its words have them:
// even ones first.
struct RowGroup {
    std::int8_t codes[kPanelGroup];
    float scale;
    std::int32_t start;
};

struct FewCodesPart {
    LinearKind kind;
    const char* layout;                                            // first block of the part
    const RowGroup* rows;                                          // [tokens, groups]
    std::int64_t tokens, groups, first_row, stop_row, out_stride;  // first_row a multiple of 32
    float* out;                                                    // [tokens, out_stride]
};

#define RSVLM_DECLARE_CODES(isa)                                                                              \
    namespace isa {                                                                                           \
    void round_groups(LinearKind kind, const float* x, std::int64_t groups, RowGroup* to, std::int64_t step); \
    void unpack_codes(const PanelPart& part);                                                                 \
    void multiply_codes(const TilePart& part);                                                                \
    void multiply_few_codes(const FewCodesPart& part);                                                        \
    }
RSVLM_DECLARE_CODES(portable)
RSVLM_DECLARE_CODES(avx2)
RSVLM_DECLARE_CODES(avx512)
RSVLM_DECLARE_CODES(avx512_bf16)
#undef RSVLM_DECLARE_CODES

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

constexpr int kQuads = kPanelGroup / 4;
constexpr int kStripe = 2 * kLanes;                               // rows of the weight that go together
constexpr int kGroupVectors = 2 * (kQuads + 1);                   // of a stripe in a panel: quads, then scales
constexpr int kCodeRows = kLanes == 4 ? 2 : kLanes == 8 ? 3 : 5;  // rows of x in registers; with 6 of AVX-512 none is left
constexpr float kSmallestScale =
    1.2e-38f;                          // below float's normal numbers none has a reciprocal: so small a group counts as zero
constexpr std::int64_t kAhead = 8192;  // bytes: the hardware's prefetcher stops at the end of a page

inline std::int64_t group_bytes(LinearKind kind) { return kPanelRows * (kind == LinearKind::kInt8 ? 34 : 18); }

// One group of a stripe: the quads of its two vectors, then their scales.
inline __attribute__((always_inline)) void read_group(LinearKind kind, const char* group, std::int64_t lane,
                                                      Ints (&quads)[kQuads][2], Vec (&scales)[2]) {
    const char* codes = group + kPanelRows * 2;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
        const std::int64_t first = lane + v * kLanes;
        scales[v] = load_half(reinterpret_cast<const std::uint16_t*>(group) + first);
        if (kind == LinearKind::kInt4) {
#pragma GCC unroll 4
            for (int octet = 0; octet < kQuads / 2; ++octet) {
                const Words words = load_words(codes + (octet * kPanelRows + first) * 4);
                quads[octet * 2][v] = low_halves(words);
                quads[octet * 2 + 1][v] = high_halves(words);
            }
        } else {
#pragma GCC unroll 8
            for (int quad = 0; quad < kQuads; ++quad) {
                quads[quad][v] = quads_of_columns(codes + quad * 4 * kPanelRows, first);
            }
        }
    }
}

// The same group of `Rows` rows of x. Three rows hang on one pointer by x86's scaled index: left to itself, GCC keeps a pointer
// per row, runs out of registers and loses a tenth of the products.
template <int Rows>
struct GroupOfRows {
    static constexpr int kBases = (Rows + 2) / 3;
    const char* bases[kBases];
    std::int64_t stride;  // bytes

    inline __attribute__((always_inline)) GroupOfRows(const RowGroup* first, std::int64_t groups)
        : stride(groups * static_cast<std::int64_t>(sizeof(RowGroup))) {
#pragma GCC unroll 2
        for (int i = 0; i < kBases; ++i) {
            bases[i] = reinterpret_cast<const char*>(first) + 3 * i * stride;
        }
    }
    inline __attribute__((always_inline)) const RowGroup* row(int r) const {
        return reinterpret_cast<const RowGroup*>(bases[r / 3] + r % 3 * stride);
    }
    inline __attribute__((always_inline)) void advance() {
#pragma GCC unroll 2
        for (int i = 0; i < kBases; ++i) {
            bases[i] += sizeof(RowGroup);
            asm("" : "+r"(bases[i]));
        }
    }
};

// totals[r][v] += this group's products of row r; `quads(quad, v)` and `scales(v)` give vectors.
template <int Rows, class Quads, class Scales>
inline __attribute__((always_inline)) void add_group(const GroupOfRows<Rows>& rows, const Quads& quads, const Scales& scales,
                                                     Vec (&totals)[Rows][2]) {
    Ints sums[Rows][2];
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
        sums[r][0] = sums[r][1] = set1_int(rows.row(r)->start);
    }
#pragma GCC unroll 8
    for (int quad = 0; quad < kQuads; ++quad) {
        const Ints low = quads(quad, 0), high = quads(quad, 1);
#pragma GCC unroll 6
        for (int r = 0; r < Rows; ++r) {
            std::int32_t bytes;
            std::memcpy(&bytes, rows.row(r)->codes + quad * 4, sizeof(bytes));
            const Quad x = broadcast_quad(bytes);
            sums[r][0] = dot_quads(sums[r][0], low, x);
            sums[r][1] = dot_quads(sums[r][1], high, x);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
        const Vec scale = set1(rows.row(r)->scale);
        const Vec offset = set1(kFloatOffset);
        totals[r][0] = fma(sub(as_float(sums[r][0]), offset), mul(scales(0), scale), totals[r][0]);
        totals[r][1] = fma(sub(as_float(sums[r][1]), offset), mul(scales(1), scale), totals[r][1]);
    }
}

template <int Rows>
inline __attribute__((always_inline)) void clear(Vec (&totals)[Rows][2]) {
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
        totals[r][0] = totals[r][1] = zero();
    }
}

template <int Rows>
inline void run_code_tile(const TilePart& part, std::int64_t token) {
    const auto* x = static_cast<const RowGroup*>(part.x) + token * part.count;
    const float* panel = part.panel;
    for (std::int64_t lane = 0; lane < kPanelRows; lane += kStripe) {
        GroupOfRows<Rows> rows(x, part.count);
        Vec totals[Rows][2];
        clear<Rows>(totals);
        for (std::int64_t group = 0; group < part.count; ++group, panel += kGroupVectors * kLanes) {
            add_group<Rows>(
                rows, [&](int quad, int v) { return load_ints(panel + (quad * 2 + v) * kLanes); },
                [&](int v) { return load(panel + (kQuads * 2 + v) * kLanes); }, totals);
            rows.advance();
        }
        finish_tile<Rows>(part, token, lane, totals);
    }
}

// What is left, at most `Rows` rows, as one tile: in two, each would wait for its own few chains.
template <int Rows>
inline void run_rest(const TilePart& part, std::int64_t token) {
    if (part.tokens - token == Rows) {
        run_code_tile<Rows>(part, token);
    } else if constexpr (Rows > 1) {
        run_rest<Rows - 1>(part, token);
    }
}

__attribute__((noinline)) void store_some(float* to, Vec value, std::int64_t count) {
    if (count > 0) {
        store_first(to, value, count < kLanes ? count : kLanes);
    }
}

// `Rows` rows of x times one block, whose codes go from the layout into registers.
template <LinearKind Kind, int Rows>
void run_few(const FewCodesPart& part, const char* block, const RowGroup* x, std::int64_t present, float* out) {
    for (std::int64_t lane = 0; lane < present; lane += kStripe) {
        GroupOfRows<Rows> rows(x, part.groups);
        Vec totals[Rows][2];
        clear<Rows>(totals);
        const char* group = block;
        for (std::int64_t g = 0; g < part.groups; ++g, group += group_bytes(Kind)) {
            for (std::int64_t line = 0; lane == 0 && line < group_bytes(Kind); line += 64) {
                __builtin_prefetch(group + kAhead + line);
            }
            Ints quads[kQuads][2];
            Vec scales[2];
            read_group(Kind, group, lane, quads, scales);
            add_group<Rows>(rows, [&](int quad, int v) { return quads[quad][v]; }, [&](int v) { return scales[v]; }, totals);
            rows.advance();
        }
        float* to = out + lane;
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r, to += part.out_stride) {
            if (present - lane >= kStripe) {
                store(to, totals[r][0]);
                store(to + kLanes, totals[r][1]);
            } else {
                store_some(to, totals[r][0], present - lane);
                store_some(to + kLanes, totals[r][1], present - lane - kLanes);
            }
        }
    }
}

template <LinearKind Kind>
void run_few_blocks(const FewCodesPart& part) {
    constexpr int kRowsAtOnce = kLanes == 16 ? 4 : 2;  // beside the quads
    const char* block = part.layout;
    for (std::int64_t row = part.first_row; row < part.stop_row; row += kPanelRows, block += part.groups * group_bytes(Kind)) {
        const std::int64_t present = part.stop_row - row < kPanelRows ? part.stop_row - row : kPanelRows;
        for (std::int64_t token = 0; token < part.tokens;) {
            const std::int64_t left = part.tokens - token;
            const RowGroup* x = part.rows + token * part.groups;
            float* out = part.out + token * part.out_stride + row;
            if (left >= kRowsAtOnce) {
                run_few<Kind, kRowsAtOnce>(part, block, x, present, out);
                token += kRowsAtOnce;
            } else if (left >= 2) {
                run_few<Kind, 2>(part, block, x, present, out);
                token += 2;
            } else {
                run_few<Kind, 1>(part, block, x, present, out);
                ++token;
            }
        }
    }
}

}  // namespace

// 127 levels on each side of zero by the largest value of a group. A group with NaN or infinity has the scale NaN, which its
// products become. Groups of 32 neighbours in x come to lie `step` apart.
void round_groups(LinearKind kind, const float* x, std::int64_t groups, RowGroup* to, std::int64_t step) {
    const std::int32_t offset = kind == LinearKind::kInt4 ? 8 : 128;
#ifdef RSVLM_DOT_BF16
    for (std::int64_t first = 0; first < groups; first += kLanes, x += kLanes * kPanelGroup, to += kLanes * step) {
        const std::int64_t count = groups - first < kLanes ? groups - first : kLanes;
        const Vec most = largest_of_groups(x, count);
        const Vec scale = select_greater(set1(__builtin_inff()), most, div(most, set1(127.0f)), set1(__builtin_nanf("")));
        const Vec factor = select_greater(scale, set1(kSmallestScale), div(set1(127.0f), most), zero());
        alignas(64) float scales[kLanes], factors[kLanes];
        alignas(64) std::int32_t sums[kLanes];
        store(scales, scale);
        store(factors, factor);
        __m256i parts[kLanes];
        for (std::int64_t i = 0; i < kLanes; ++i) {
            const std::int64_t group = i < count ? i : count - 1;  // again where there is none
            parts[i] = write_group(x + group * kPanelGroup, factors[group], kind == LinearKind::kInt4, to[group * step].codes);
        }
        store_ints(reinterpret_cast<float*>(sums), sums_of_groups(parts));
        for (std::int64_t i = 0; i < count; ++i) {
            to[i * step].scale = scales[i];
            to[i * step].start = kFloatBits - offset * sums[place_of_sum(static_cast<int>(i))];
        }
    }
#else
    for (std::int64_t group = 0; group < groups; ++group, x += kPanelGroup, to += step) {
        const float most = largest_of_group(x);
        const bool finite = most < __builtin_inff();
        to->scale = finite ? most / 127.0f : __builtin_nanf("");
        const float factor = finite && to->scale > kSmallestScale ? 127.0f / most : 0.0f;
        Vec sum = zero();
        for (int i = 0; i < kPanelGroup; i += kLanes) {
            const Vec rounded = finite ? round(mul(load(x + i), set1(factor))) : zero();
            sum = add(sum, rounded);
            store_codes(to->codes + i, rounded);
        }
        to->start = kFloatBits - offset * static_cast<std::int32_t>(sum_lanes(sum));
        if (kind == LinearKind::kInt4) {
            split_octets(to->codes);
        }
    }
#endif
}

void unpack_codes(const PanelPart& part) {
    float* panel = part.panel;
    for (std::int64_t lane = 0; lane < kPanelRows; lane += kStripe) {
        const char* group = part.block;
        for (std::int64_t g = 0; g < part.groups; ++g, group += group_bytes(part.kind), panel += kGroupVectors * kLanes) {
            Ints quads[kQuads][2];
            Vec scales[2];
            read_group(part.kind, group, lane, quads, scales);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
#pragma GCC unroll 8
                for (int quad = 0; quad < kQuads; ++quad) {
                    store_ints(panel + (quad * 2 + v) * kLanes, quads[quad][v]);
                }
                store(panel + (kQuads * 2 + v) * kLanes, scales[v]);
            }
        }
    }
}

void multiply_codes(const TilePart& part) {
    std::int64_t token = 0;
    FetchAhead ahead(part, kCodeRows);
    for (; token + kCodeRows <= part.tokens; token += kCodeRows) {
        ahead.share();
        run_code_tile<kCodeRows>(part, token);
    }
    ahead.share();
    run_rest<kCodeRows - 1>(part, token);
}

void multiply_few_codes(const FewCodesPart& part) {
    if (part.kind == LinearKind::kInt4) {
        run_few_blocks<LinearKind::kInt4>(part);
    } else {
        run_few_blocks<LinearKind::kInt8>(part);
    }
}

}  // namespace rsvlm::RSVLM_ISA
#endif
