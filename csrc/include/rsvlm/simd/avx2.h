// Eight float lanes with AVX2, FMA and F16C. Everything that is compiled after this header may use these instructions, so a
// file that includes it holds kernels only: no standard templates, which the linker could hand to code that runs on older
// machines.
#pragma once

#include <cstdint>
#include <cstring>

#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>

#define RSVLM_ISA avx2

namespace rsvlm::RSVLM_ISA {
namespace {

using Vec = __m256;

constexpr int kLanes = 8;
constexpr int kRows = 4;        // rows of a register tile
constexpr int kMaxVectors = 3;  // vectors of a register tile: 12 accumulators, 3 operands, 1 broadcast of 16 registers

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
inline Vec set1(float value) { return _mm256_set1_ps(value); }
inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand when either is NaN.
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(set1(-0.0f), a); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
inline Vec zero_where_minus_infinity(Vec a) {
    return _mm256_andnot_ps(_mm256_cmp_ps(a, set1(-__builtin_inff()), _CMP_EQ_OQ), a);
}
inline Vec round(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n for integral n in [-126, 128]; 2^128 is infinity.
inline Vec power_of_two(Vec n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline float sum_lanes(Vec a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
}

inline Vec load_bf16(const std::uint16_t* from) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline void store_bf16(std::uint16_t* to, Vec value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}

inline Vec load_int8(const std::int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Vec load_half(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Eight 4-bit codes per lane, each the value plus 8. code_at reads the one at bits 4 j, j in 0..4, as a float without a shift:
// under the exponent 23 - 4 j the field counts units, and the subtraction of the rest is exact.
using Words = __m256i;
inline Words load_words(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline Words drop_five_codes(Words words) { return _mm256_srli_epi32(words, 20); }
inline Vec code_at(Words words, int j) {
    const __m256i code = _mm256_and_si256(words, _mm256_set1_epi32(15 << (4 * j)));
    const __m256i bits = _mm256_or_si256(code, _mm256_set1_epi32((150 - 4 * j) << 23));
    return _mm256_sub_ps(_mm256_castsi256_ps(bits), set1(static_cast<float>((1 << (23 - 4 * j)) + 8)));
}

// Eight 32-bit integers, mostly quads: four neighbouring columns of a row, a byte each.
using Ints = __m256i;
inline Ints load_ints(const float* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store_ints(float* to, Ints value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
inline Ints set1_int(std::int32_t value) { return _mm256_set1_epi32(value); }
inline Vec as_float(Ints value) { return _mm256_castsi256_ps(value); }
inline Ints low_halves(Words words) { return _mm256_and_si256(words, _mm256_set1_epi32(0x0f0f0f0f)); }
inline Ints high_halves(Words words) { return low_halves(_mm256_srli_epi32(words, 4)); }
// The largest magnitude of 32 values, at least infinity or NaN when one is no finite number: their bits rise with them.
inline float largest_of_group(const float* x) {
    __m256i largest = _mm256_setzero_si256();
    for (int i = 0; i < 32; i += kLanes) {
        largest = _mm256_max_epi32(largest, _mm256_and_si256(load_ints(x + i), _mm256_set1_epi32(0x7fffffff)));
    }
    const __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    const __m128i quarter = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    const std::int32_t bits = _mm_cvtsi128_si32(_mm_max_epi32(quarter, _mm_shuffle_epi32(quarter, 0xb1)));
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
// Rounded values -128..127, a byte each.
inline void store_codes(std::int8_t* to, Vec rounded) {
    const __m256i whole = _mm256_cvtps_epi32(rounded);
    const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(halves, halves));
}
// Even columns of each octet of 32 codes before odd ones.
inline void split_octets(std::int8_t* codes) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    auto* place = reinterpret_cast<__m256i*>(codes);
    _mm256_storeu_si256(place, _mm256_shuffle_epi8(_mm256_loadu_si256(place), order));
}
// Rows `lane`..`lane` + 7 of four columns of 32 codes, each code plus 128.
inline Ints quads_of_columns(const char* columns, std::int64_t lane) {
    const auto column = [&](int i) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(columns + lane + i * 32)); };
    const __m128i ab = _mm_unpacklo_epi8(column(0), column(1)), cd = _mm_unpacklo_epi8(column(2), column(3));
    const __m256i quads = _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
    return _mm256_xor_si256(quads, _mm256_set1_epi8(-128));
}
struct Quad {
    __m256i even, odd;  // bytes 0 and 2, 1 and 3, as 16 bits
};
inline Quad broadcast_quad(std::int32_t quad) {
    const __m256i bytes = _mm256_set1_epi32(quad);
    return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
// sum += unsigned bytes of `quads` times signed bytes of `x`, four products a lane, exact: the instruction for bytes saturates.
inline Ints dot_quads(Ints sum, Ints quads, Quad x) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(quads, _mm256_set1_epi16(255)), x.even);
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_srli_epi16(quads, 8), x.odd)));
}

inline void transpose(Vec (&rows)[kLanes]) {
    Vec pairs[kLanes];
    for (int i = 0; i < 8; i += 4) {  // two by two, then four by four inside 128-bit lanes
        const Vec low0 = _mm256_unpacklo_ps(rows[i], rows[i + 1]), high0 = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
        const Vec low1 = _mm256_unpacklo_ps(rows[i + 2], rows[i + 3]), high1 = _mm256_unpackhi_ps(rows[i + 2], rows[i + 3]);
        pairs[i] = _mm256_shuffle_ps(low0, low1, 0x44);
        pairs[i + 1] = _mm256_shuffle_ps(low0, low1, 0xee);
        pairs[i + 2] = _mm256_shuffle_ps(high0, high1, 0x44);
        pairs[i + 3] = _mm256_shuffle_ps(high0, high1, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2f128_ps(pairs[i], pairs[i + 4], 0x31);
    }
}

}  // namespace
}  // namespace rsvlm::RSVLM_ISA

#define RSVLM_EXP2_BY_INTEGER 1
#include "rsvlm/simd/functions.h"
