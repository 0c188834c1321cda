// Four float lanes with the compiler's vector extension: SSE2 on x86-64, NEON on aarch64, correct anywhere.
#pragma once

#include <cstdint>
#include <cstring>

#define RSVLM_ISA portable

namespace rsvlm::RSVLM_ISA {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t VecInt __attribute__((vector_size(16)));

constexpr int kLanes = 4;
constexpr int kRows = 4;        // rows of a register tile
constexpr int kMaxVectors = 2;  // vectors of a register tile: 4 x 2 accumulators leave half of SSE2's 16 registers

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(value)); }
inline Vec set1(float value) { return Vec{value, value, value, value}; }
inline Vec zero() { return Vec{0.0f, 0.0f, 0.0f, 0.0f}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec blend(VecInt mask, Vec yes, Vec no) { return reinterpret_cast<Vec>((mask & (VecInt)yes) | (~mask & (VecInt)no)); }
// The second operand when either is NaN.
inline Vec max(Vec a, Vec b) { return blend(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return blend(a < b, a, b); }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>((VecInt)a & 0x7fffffff); }
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return blend(a > b, yes, no); }
inline Vec zero_where_minus_infinity(Vec a) { return blend(a == set1(-__builtin_inff()), zero(), a); }
inline Vec round(Vec a) {
    const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: the sum has no bits left for a fraction; |a| < 2^22
    return (a + magic) - magic;
}
// 2^n for integral n in [-126, 128]; 2^128 is infinity.
inline Vec power_of_two(Vec n) { return reinterpret_cast<Vec>((__builtin_convertvector(n, VecInt) + 127) << 23); }
inline float sum_lanes(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

inline Vec load_bf16(const std::uint16_t* from) {
    VecInt bits;
    for (int lane = 0; lane < kLanes; ++lane) {
        bits[lane] = static_cast<std::int32_t>(static_cast<std::uint32_t>(from[lane]) << 16);
    }
    return reinterpret_cast<Vec>(bits);
}
inline void store_bf16(std::uint16_t* to, Vec value) {
    for (int lane = 0; lane < kLanes; ++lane) {
        std::uint32_t bits;
        const float single = value[lane];
        std::memcpy(&bits, &single, sizeof(bits));
        to[lane] = single != single ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
}

inline Vec load_int8(const std::int8_t* from) {
    Vec value;
    for (int lane = 0; lane < kLanes; ++lane) {
        value[lane] = static_cast<float>(from[lane]);
    }
    return value;
}
// float16 to float32, exact: the exponent is moved by a multiplication, which also normalises denormals.
inline Vec load_half(const std::uint16_t* from) {
    VecInt bits, signs;
    for (int lane = 0; lane < kLanes; ++lane) {
        bits[lane] = (from[lane] & 0x7fff) << 13;
        signs[lane] = static_cast<std::int32_t>(static_cast<std::uint32_t>(from[lane] & 0x8000) << 16);
    }
    const Vec scaled = reinterpret_cast<Vec>(bits) * set1(0x1p+112f);
    const VecInt special = bits >= (0x7c00 << 13);  // infinity or NaN keep their mantissa below a full exponent
    return reinterpret_cast<Vec>(((special & (bits | 0x7f800000)) | (~special & (VecInt)scaled)) | signs);
}

// Eight 4-bit codes per lane, each the value plus 8. code_at reads the one at bits 4 j, j in 0..4, as a float without a shift:
// under the exponent 23 - 4 j the field counts units, and the subtraction of the rest is exact.
using Words = VecInt;
inline Words load_words(const char* from) {
    Words words;
    std::memcpy(&words, from, sizeof(words));
    return words;
}
inline Words drop_five_codes(Words words) { return words >> 20; }
inline Vec code_at(Words words, int j) {
    const VecInt bits = (words & (15 << (4 * j))) | ((150 - 4 * j) << 23);
    return reinterpret_cast<Vec>(bits) - set1(static_cast<float>((1 << (23 - 4 * j)) + 8));
}

// Four 32-bit integers, mostly quads: four neighbouring columns of a row, a byte each.
using Ints = VecInt;
inline Ints load_ints(const float* from) {
    Ints value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}
inline void store_ints(float* to, Ints value) { std::memcpy(to, &value, sizeof(value)); }
inline Ints set1_int(std::int32_t value) { return Ints{value, value, value, value}; }
inline Vec as_float(Ints value) { return reinterpret_cast<Vec>(value); }
inline Ints low_halves(Words words) { return words & 0x0f0f0f0f; }
inline Ints high_halves(Words words) { return (words >> 4) & 0x0f0f0f0f; }
// The largest magnitude of 32 values, at least infinity or NaN when one is no finite number: their bits rise with them.
inline float largest_of_group(const float* x) {
    std::int32_t largest = 0;
    for (int i = 0; i < 32; ++i) {
        std::int32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    float value;
    std::memcpy(&value, &largest, sizeof(value));
    return value;
}
// Rounded values -128..127, a byte each.
inline void store_codes(std::int8_t* to, Vec rounded) {
    for (int lane = 0; lane < kLanes; ++lane) {
        to[lane] = static_cast<std::int8_t>(rounded[lane]);
    }
}
// Even columns of each octet of 32 codes before odd ones.
inline void split_octets(std::int8_t* codes) {
    for (int octet = 0; octet < 32; octet += 8) {
        std::int8_t copy[8];
        std::memcpy(copy, codes + octet, sizeof(copy));
        for (int i = 0; i < 8; ++i) {
            codes[octet + i] = copy[i < 4 ? 2 * i : 2 * i - 7];
        }
    }
}
// Rows `lane`..`lane` + 3 of four columns of 32 codes, each code plus 128.
inline Ints quads_of_columns(const char* columns, std::int64_t lane) {
    Ints quads;
    for (int i = 0; i < kLanes; ++i) {
        std::uint32_t bytes = 0;
        for (int column = 3; column >= 0; --column) {
            bytes = bytes << 8 | static_cast<std::uint8_t>(columns[lane + i + column * 32] ^ -128);
        }
        quads[i] = static_cast<std::int32_t>(bytes);
    }
    return quads;
}
struct Quad {
    std::int32_t values[4];
};
inline Quad broadcast_quad(std::int32_t quad) {
    Quad x;
    for (int i = 0; i < 4; ++i) {
        x.values[i] = static_cast<std::int8_t>(static_cast<std::uint32_t>(quad) >> (8 * i));
    }
    return x;
}
// sum += unsigned bytes of `quads` times signed bytes of `x`, four products a lane, exact.
inline Ints dot_quads(Ints sum, Ints quads, Quad x) {
    for (int i = 0; i < 4; ++i) {
        sum += ((quads >> (8 * i)) & 255) * x.values[i];
    }
    return sum;
}

inline void transpose(Vec (&rows)[kLanes]) {
    const Vec a = rows[0], b = rows[1], c = rows[2], d = rows[3];
    for (int i = 0; i < kLanes; ++i) {
        rows[i] = Vec{a[i], b[i], c[i], d[i]};
    }
}

}  // namespace
}  // namespace rsvlm::RSVLM_ISA

#define RSVLM_EXP2_BY_INTEGER 1
#include "rsvlm/simd/functions.h"
