// Sixteen float lanes with AVX-512 F, BW, DQ, VL; RSVLM_DOT_BF16 adds the dot products of bf16 and of bytes, and permutations
// of bytes, which the same CPUs have. What avx2.h says about files that include it holds here too.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef RSVLM_DOT_BF16
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx512vbmi")
#define RSVLM_ISA avx512_bf16
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define RSVLM_ISA avx512
#endif
#include <immintrin.h>
// GCC 12 takes the "undefined" pass-through operand of its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"

namespace rsvlm::RSVLM_ISA {
namespace {

using Vec = __m512;

constexpr int kLanes = 16;
constexpr int kRows = 8;        // rows of a register tile
constexpr int kMaxVectors = 3;  // vectors of a register tile: 24 accumulators of 32 registers

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
inline Vec set1(float value) { return _mm512_set1_ps(value); }
inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand when either is NaN.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_andnot_ps(set1(-0.0f), a); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
inline Vec zero_where_minus_infinity(Vec a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, set1(-__builtin_inff()), _CMP_NEQ_UQ), a);
}
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale_by_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
inline float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a); }

inline Vec load_bf16(const std::uint16_t* from) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline void store_bf16(std::uint16_t* to, Vec value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}

inline Vec load_int8(const std::int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vec load_half(const std::uint16_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// Eight 4-bit codes per lane, each the value plus 8. code_at reads the one at bits 4 j, j in 0..4, as a float.
using Words = __m512i;
inline Words load_words(const char* from) { return _mm512_loadu_si512(from); }
inline Words drop_five_codes(Words words) { return _mm512_srli_epi32(words, 20); }
inline Vec code_at(Words words, int j) {
    // a table of 16 floats in one register; the permute looks at the lowest 4 bits of a lane only
    const Vec table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * j), table);
}

// Sixteen 32-bit integers, mostly quads: four neighbouring columns of a row, a byte each.
using Ints = __m512i;
inline Ints load_ints(const float* from) { return _mm512_loadu_si512(from); }
inline void store_ints(float* to, Ints value) { _mm512_storeu_si512(to, value); }
inline Ints set1_int(std::int32_t value) { return _mm512_set1_epi32(value); }
inline Vec as_float(Ints value) { return _mm512_castsi512_ps(value); }
inline Ints low_halves(Words words) { return _mm512_and_si512(words, _mm512_set1_epi32(0x0f0f0f0f)); }
inline Ints high_halves(Words words) { return low_halves(_mm512_srli_epi32(words, 4)); }
// The largest magnitude of 32 values, at least infinity or NaN when one is no finite number: their bits rise with them.
inline float largest_of_group(const float* x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    const __m512i low = _mm512_and_si512(load_ints(x), magnitude), high = _mm512_and_si512(load_ints(x + 16), magnitude);
    const std::int32_t bits = _mm512_reduce_max_epi32(_mm512_max_epi32(low, high));
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
// Rounded values -128..127, a byte each.
inline void store_codes(std::int8_t* to, Vec rounded) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(rounded)));
}
// Even columns of each octet of 32 codes before odd ones.
inline void split_octets(std::int8_t* codes) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    auto* place = reinterpret_cast<__m256i*>(codes);
    _mm256_storeu_si256(place, _mm256_shuffle_epi8(_mm256_loadu_si256(place), order));
}
#ifdef RSVLM_DOT_BF16
// Each pair of neighbouring 128-bit lanes becomes its maximum: those of a, then those of b.
inline __m512i fold_lanes(__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
// The same of 1..16 groups, one after another in x, in a lane each; the other lanes are undefined. Maxima go up a tree that
// halves the vectors at each step, where one group alone would fold its own vector five times.
inline Vec largest_of_groups(const float* x, std::int64_t count) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i fours[4];
    for (std::int64_t i = 0; i < 4; ++i) {
        __m512i most[4];
        for (std::int64_t j = 0; j < 4; ++j) {
            const float* group = x + (i * 4 + j < count ? i * 4 + j : count - 1) * 32;
            most[j] = _mm512_max_epi32(_mm512_and_si512(load_ints(group), magnitude),
                                       _mm512_and_si512(load_ints(group + 16), magnitude));
        }
        const __m512i low = _mm512_max_epi32(_mm512_unpacklo_epi32(most[0], most[1]), _mm512_unpackhi_epi32(most[0], most[1]));
        const __m512i high = _mm512_max_epi32(_mm512_unpacklo_epi32(most[2], most[3]), _mm512_unpackhi_epi32(most[2], most[3]));
        fours[i] = _mm512_max_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    return _mm512_castsi512_ps(fold_lanes(fold_lanes(fours[0], fours[1]), fold_lanes(fours[2], fours[3])));
}
// Values -127..127 rounded to codes, in order or with even columns of each octet first. Gives the codes' sums over four
// neighbours in eight lanes.
inline __m256i write_group(const float* x, float factor, bool octets, std::int8_t* codes) {
    const __m512i low = _mm512_cvtps_epi32(mul(load(x), set1(factor))),
                  high = _mm512_cvtps_epi32(mul(load(x + 16), set1(factor)));
    const __m512i in_order = _mm512_setr_epi32(0x0c080400, 0x1c181410, 0x2c282420, 0x3c383430, 0x4c484440, 0x5c585450,
                                               0x6c686460, 0x7c787470, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i even_first = _mm512_setr_epi32(0x18100800, 0x1c140c04, 0x38302820, 0x3c342c24, 0x58504840, 0x5c544c44,
                                                 0x78706860, 0x7c746c64, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m256i bytes = _mm512_castsi512_si256(_mm512_permutex2var_epi8(low, octets ? even_first : in_order, high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), bytes);
}
// Sums of the eight lanes of each of sixteen groups; that of group g comes to lie at place_of_sum(g).
inline Ints sums_of_groups(const __m256i (&parts)[16]) {
    __m512i eights[2];
    for (int i = 0; i < 2; ++i) {
        __m512i pairs[4];
        for (int j = 0; j < 4; ++j) {
            pairs[j] = _mm512_inserti64x4(_mm512_castsi256_si512(parts[i * 8 + j * 2]), parts[i * 8 + j * 2 + 1], 1);
        }
        const __m512i low =
            _mm512_add_epi32(_mm512_unpacklo_epi32(pairs[0], pairs[1]), _mm512_unpackhi_epi32(pairs[0], pairs[1]));
        const __m512i high =
            _mm512_add_epi32(_mm512_unpacklo_epi32(pairs[2], pairs[3]), _mm512_unpackhi_epi32(pairs[2], pairs[3]));
        eights[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
    }
    return _mm512_add_epi32(_mm512_shuffle_i32x4(eights[0], eights[1], 0x88), _mm512_shuffle_i32x4(eights[0], eights[1], 0xdd));
}
inline int place_of_sum(int group) { return group / 8 * 8 + group % 2 * 4 + group % 8 / 2; }
// Rows `lane`..`lane` + 15 of four columns of 32 codes, each code plus 128.
inline Ints quads_of_columns(const char* columns, std::int64_t lane) {
    const __m512i places =
        _mm512_setr_epi32(0x60402000, 0x61412101, 0x62422202, 0x63432303, 0x64442404, 0x65452505, 0x66462606, 0x67472707,
                          0x68482808, 0x69492909, 0x6a4a2a0a, 0x6b4b2b0b, 0x6c4c2c0c, 0x6d4d2d0d, 0x6e4e2e0e, 0x6f4f2f0f);
    const __m512i index = _mm512_add_epi8(places, _mm512_set1_epi8(static_cast<char>(lane)));
    const __m512i quads = _mm512_permutex2var_epi8(_mm512_loadu_si512(columns), index, _mm512_loadu_si512(columns + 64));
    return _mm512_xor_si512(quads, _mm512_set1_epi8(-128));
}
using Quad = __m512i;
inline Quad broadcast_quad(std::int32_t quad) { return _mm512_set1_epi32(quad); }
// sum += unsigned bytes of `quads` times signed bytes of `x`, four products a lane, exact.
inline Ints dot_quads(Ints sum, Ints quads, Quad x) { return _mm512_dpbusd_epi32(sum, quads, x); }
#else
inline Ints quads_of_columns(const char* columns, std::int64_t lane) {
    const auto column = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(columns + lane + i * 32)); };
    const __m128i a = column(0), b = column(1), c = column(2), d = column(3);
    const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
    const __m128i ab_high = _mm_unpackhi_epi8(a, b), cd_high = _mm_unpackhi_epi8(c, d);
    __m512i quads = _mm512_castsi128_si512(_mm_unpacklo_epi16(ab, cd));
    quads = _mm512_inserti32x4(quads, _mm_unpackhi_epi16(ab, cd), 1);
    quads = _mm512_inserti32x4(quads, _mm_unpacklo_epi16(ab_high, cd_high), 2);
    quads = _mm512_inserti32x4(quads, _mm_unpackhi_epi16(ab_high, cd_high), 3);
    return _mm512_xor_si512(quads, _mm512_set1_epi8(-128));
}
struct Quad {
    __m512i even, odd;  // bytes 0 and 2, 1 and 3, as 16 bits
};
inline Quad broadcast_quad(std::int32_t quad) {
    const __m512i bytes = _mm512_set1_epi32(quad);
    return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
}
// sum += unsigned bytes of `quads` times signed bytes of `x`, four products a lane, exact: the instruction for bytes saturates.
inline Ints dot_quads(Ints sum, Ints quads, Quad x) {
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(quads, _mm512_set1_epi16(255)), x.even);
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, _mm512_madd_epi16(_mm512_srli_epi16(quads, 8), x.odd)));
}
#endif

inline void transpose(Vec (&rows)[kLanes]) {
    Vec quads[kLanes];
    for (int i = 0; i < 16; i += 4) {  // four by four inside 128-bit lanes
        const Vec low0 = _mm512_unpacklo_ps(rows[i], rows[i + 1]), high0 = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
        const Vec low1 = _mm512_unpacklo_ps(rows[i + 2], rows[i + 3]), high1 = _mm512_unpackhi_ps(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_shuffle_ps(low0, low1, 0x44);
        quads[i + 1] = _mm512_shuffle_ps(low0, low1, 0xee);
        quads[i + 2] = _mm512_shuffle_ps(high0, high1, 0x44);
        quads[i + 3] = _mm512_shuffle_ps(high0, high1, 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // then the 4 x 4 grid of 128-bit lanes
        const Vec even0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0x88);
        const Vec odd0 = _mm512_shuffle_f32x4(quads[i], quads[i + 4], 0xdd);
        const Vec even1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0x88);
        const Vec odd1 = _mm512_shuffle_f32x4(quads[i + 8], quads[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_f32x4(even0, even1, 0x88);
        rows[i + 4] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
        rows[i + 8] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
        rows[i + 12] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
}

#ifdef RSVLM_DOT_BF16
// Lane i of the result is a pair: bf16(low[i]) and bf16(high[i]), as the dot product wants its operands.
inline Vec pair_bf16(Vec low, Vec high) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);  // low's 16 values, then high's
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, both));
}
// Lane i of the result is the pair (low[i], high[i]) of 16 values each.
inline Vec pair_rows(const std::uint16_t* low, const std::uint16_t* high) {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
    return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
}
// Codes j and j + 4 of each lane, j in 0..3, as a pair of bf16: a table of 32 halves in one register, of which a half's lowest
// 5 bits choose, so the table is there twice and the fifth bit does not matter.
inline Vec code_pair(Words words, int j) {
    const __m512i eight = _mm512_setr_epi32(static_cast<int>(0xc0e0c100), static_cast<int>(0xc0a0c0c0),
                                            static_cast<int>(0xc040c080), static_cast<int>(0xbf80c000), 0x3f800000, 0x40404000,
                                            0x40a04080, 0x40e040c0, 0, 0, 0, 0, 0, 0, 0, 0);  // -8 .. 7
    const __m512i table = _mm512_shuffle_i64x2(eight, eight, 0x44);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi32(words, 4 * j), table));
}
inline Vec dot_pairs(Vec sum, Vec a, Vec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
#endif

}  // namespace
}  // namespace rsvlm::RSVLM_ISA

#include "rsvlm/simd/functions.h"
