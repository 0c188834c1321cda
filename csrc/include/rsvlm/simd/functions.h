// Functions over Vec that need no instruction of their own. Included by portable.h, avx2.h and avx512.h, never alone.
#pragma once

namespace rsvlm::RSVLM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// 2^f = 1 + f * P(f) on [-1/2, 1/2], minimax: relative error 2e-9 before rounding, below 1.2 ulp after (0.94 with FMA).
constexpr float kExp2Coefficients[] = {
    1.535336196e-04f, 1.339887502e-03f, 9.618436918e-03f, 5.550332367e-02f, 2.402264774e-01f, 6.931471825e-01f, 1.0f};
inline Vec exp2_fraction(Vec f) {
    Vec p = set1(kExp2Coefficients[0]);
#pragma GCC unroll 6
    for (int k = 1; k < 7; ++k) {
        p = fma(p, f, set1(kExp2Coefficients[k]));
    }
    return p;
}

// n integral, -126 to 0.
inline Vec times_power_of_two(Vec x, Vec n) {
#ifdef RSVLM_EXP2_BY_INTEGER
    return mul(x, power_of_two(n));
#else
    return scale_by_power_of_two(x, n);
#endif
}

// 2^x below 1.2 ulp; 0 from -infinity, infinity from 128 (127.5 without scalef), NaN from NaN. Below 2^-126 it may be 0.
inline Vec exp2(Vec x) {
#ifdef RSVLM_EXP2_BY_INTEGER
    // Underflow and overflow by hand, because an exponent field that is made by adding integers knows neither.
    const Vec bounded = min(set1(128.0f), max(set1(-126.0f), x));
    const Vec n = round(bounded);
    const Vec value = mul(exp2_fraction(sub(bounded, n)), power_of_two(n));
    return select_greater(set1(-126.0f), x, zero(), value);
#else
    const Vec bounded = min(set1(129.0f), max(set1(-152.0f), x));  // keeps infinities out of the subtraction
    const Vec n = round(bounded);
    return scale_by_power_of_two(exp2_fraction(sub(bounded, n)), n);
#endif
}

// x / (1 + e^-x)
inline Vec silu(Vec x) { return div(x, add(set1(1.0f), exp2(mul(x, set1(-kLog2E))))); }

// x/2 * (1 + erf(x / sqrt 2)), with 1 - erf(t) = 2^(t * Q(t)) on [0, 4], minimax: relative error 3e-8 before rounding. Neither
// sign of x cancels: 1 + erf is 2 - 2^... above zero, where it is at least 1, and 2^... itself below. Several vectors go side
// by side, because one is a chain of thirty operations, of which a CPU has too few in sight to overlap them with the next
// one's.
template <int Vectors>
inline __attribute__((always_inline)) void gelu(Vec (&x)[Vectors]) {
    constexpr float kCoefficients[] = {-3.03003164e-06f,  3.53755606e-05f,  -2.398059123e-04f, 1.012763559e-03f,
                                       -2.424858678e-03f, 1.07232954e-04f,  2.779648418e-02f,  -1.483652743e-01f,
                                       -9.184270682e-01f, -1.627908595e+00f};
    Vec t[Vectors], q[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
        t[i] = min(set1(4.0f), abs(mul(x[i], set1(0.70710678118654752f))));
        q[i] = set1(1.153971591e-07f);
    }
#pragma GCC unroll 10
    for (const float coefficient : kCoefficients) {
#pragma GCC unroll 8
        for (int i = 0; i < Vectors; ++i) {
            q[i] = fma(q[i], t[i], set1(coefficient));
        }
    }
    Vec n[Vectors], p[Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
        q[i] = mul(q[i], t[i]);  // -26 to 0: no bounds to look after
        n[i] = round(q[i]);
        q[i] = sub(q[i], n[i]);
        p[i] = set1(kExp2Coefficients[0]);
    }
#pragma GCC unroll 6
    for (int k = 1; k < 7; ++k) {
#pragma GCC unroll 8
        for (int i = 0; i < Vectors; ++i) {
            p[i] = fma(p[i], q[i], set1(kExp2Coefficients[k]));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Vectors; ++i) {
        // from 4 on, 1 - erf is below a rounding of 1 and counts as 0
        const Vec rest = select_greater(set1(4.0f), t[i], times_power_of_two(p[i], n[i]), zero());
        x[i] = mul(mul(set1(0.5f), x[i]), select_greater(x[i], zero(), sub(set1(2.0f), rest), rest));
    }
}

inline Vec gelu(Vec x) {
    Vec one[1] = {x};
    gelu<1>(one);
    return one[0];
}

inline Vec load_float(const float* from) { return load(from); }
inline Vec load_float(const std::uint16_t* from) { return load_bf16(from); }
inline void store_float(float* to, Vec value) { store(to, value); }
inline void store_float(std::uint16_t* to, Vec value) { store_bf16(to, value); }

inline float to_float(float value) { return value; }
inline float to_float(std::uint16_t value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
}

// `count` values from `from`, the rest of `width` zeros; width a multiple of kLanes is not needed.
template <class T>
inline void copy_as_float(const T* from, std::int64_t count, std::int64_t width, float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, load_float(from + i));
    }
    for (; i < count; ++i) {
        T value;  // copied, because pairs of bfloat16 come as floats from any even address
        std::memcpy(&value, from + i, sizeof(value));
        to[i] = to_float(value);
    }
    for (; i < width; ++i) {
        to[i] = 0.0f;
    }
}

inline void store_partly(float* to, Vec value, std::int64_t count) {
    float lanes[kLanes];
    store(lanes, value);
    for (std::int64_t i = 0; i < count; ++i) {
        to[i] = lanes[i];
    }
}
inline void store_partly(std::uint16_t* to, Vec value, std::int64_t count) {
    std::uint16_t lanes[kLanes];
    store_bf16(lanes, value);
    for (std::int64_t i = 0; i < count; ++i) {
        to[i] = lanes[i];
    }
}

// The first `count` lanes, 1..kLanes.
template <class T>
inline void store_first(T* to, Vec value, std::int64_t count) {
    if (count == kLanes) {
        store_float(to, value);
    } else {
        store_partly(to, value, count);
    }
}

template <class T>
inline Vec load_partly(const T* from, std::int64_t count) {
    float lanes[kLanes];
    copy_as_float(from, count, kLanes, lanes);
    return load(lanes);
}

// Rows into lanes: to[column * lanes + row] = row_of(row)[column] for `rows` rows, zeros up to `lanes` (a multiple of kLanes).
// `row_of` gives the address of a row, so that rows may be gathered.
template <class T, class RowOf>
inline void rows_to_lanes(const RowOf& row_of, std::int64_t rows, std::int64_t columns, std::int64_t lanes, float* to) {
    for (std::int64_t row = 0; row < lanes; row += kLanes) {
        const T* source[kLanes];
        const std::int64_t present = rows - row < kLanes ? rows - row : kLanes;
        for (std::int64_t i = 0; i < present; ++i) {
            source[i] = row_of(row + i);
        }
        for (std::int64_t column = 0; column < columns; column += kLanes) {
            const std::int64_t width = columns - column < kLanes ? columns - column : kLanes;
            Vec block[kLanes];
            for (std::int64_t i = 0; i < kLanes; ++i) {
                if (i >= present) {
                    block[i] = zero();
                } else {
                    block[i] = width == kLanes ? load_float(source[i] + column) : load_partly(source[i] + column, width);
                }
            }
            transpose(block);
            for (std::int64_t i = 0; i < width; ++i) {
                store(to + (column + i) * lanes + row, block[i]);
            }
        }
    }
}

// Lanes into rows, the inverse: row_of(row)[column] = from[column * lanes + row] * factor[row].
template <class T, class RowOf>
inline void lanes_to_rows(const float* from, const float* factor, std::int64_t rows, std::int64_t columns, std::int64_t lanes,
                          const RowOf& row_of) {
    for (std::int64_t row = 0; row < rows; row += kLanes) {
        const std::int64_t present = rows - row < kLanes ? rows - row : kLanes;
        const Vec scale = load(factor + row);
        for (std::int64_t column = 0; column < columns; column += kLanes) {
            const std::int64_t width = columns - column < kLanes ? columns - column : kLanes;
            Vec block[kLanes];
            for (std::int64_t i = 0; i < kLanes; ++i) {
                block[i] = i < width ? mul(load(from + (column + i) * lanes + row), scale) : zero();
            }
            transpose(block);
            for (std::int64_t i = 0; i < present; ++i) {
                T* target = row_of(row + i) + column;
                store_first(target, block[i], width);
            }
        }
    }
}

// The register tile that attention and experts share: rows of one operand are broadcast, the other one's lanes stay in vectors.
// sums[r][n] += sum over k of a[r * row_stride + k * step] * b[(k * Vectors + n) lanes]. Every sum is one chain in order of k,
// so a lane's result depends neither on the tile's shape nor on the other lanes.
// With `ahead`, the cache lines from there on are asked for while this tile is computed, as many bytes as the tile reads of
// `a`.
template <int Rows, int Vectors>
inline __attribute__((always_inline)) void multiply_tile(const float* a, std::int64_t row_stride, std::int64_t step,
                                                         const float* b, std::int64_t count, Vec (&sums)[Rows][Vectors],
                                                         const char* ahead = nullptr) {
    for (std::int64_t k = 0; k < count; ++k) {
        if (ahead != nullptr) {
            __builtin_prefetch(ahead + k * Rows * 4, 0, 2);
        }
        Vec lanes[Vectors];
#pragma GCC unroll 4
        for (int n = 0; n < Vectors; ++n) {
            lanes[n] = load(b + (k * Vectors + n) * kLanes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            const Vec value = set1(a[r * row_stride + k * step]);
#pragma GCC unroll 4
            for (int n = 0; n < Vectors; ++n) {
                sums[r][n] = fma(value, lanes[n], sums[r][n]);
            }
        }
    }
}

#ifdef RSVLM_DOT_BF16
// The same over pairs of bf16: a and b hold two neighbours in k per 32-bit word, `count` counts pairs.
template <int Rows, int Vectors>
inline __attribute__((always_inline)) void multiply_tile(const std::uint32_t* a, std::int64_t row_stride, std::int64_t step,
                                                         const float* b, std::int64_t count, Vec (&sums)[Rows][Vectors],
                                                         const char* ahead = nullptr) {
    // Three rows hang on one pointer by x86's scaled index. Left to itself, GCC keeps an offset per row, runs out of registers
    // and loads every second operand's address from the stack.
    constexpr int kBases = (Rows + 2) / 3;
    const std::uint32_t* bases[kBases];
#pragma GCC unroll 8
    for (int i = 0; i < kBases; ++i) {
        bases[i] = a + 3 * i * row_stride;
    }
    for (std::int64_t k = 0; k < count; ++k) {
        if (ahead != nullptr) {
            __builtin_prefetch(ahead + k * Rows * 4, 0, 2);
        }
        Vec lanes[Vectors];
#pragma GCC unroll 4
        for (int n = 0; n < Vectors; ++n) {
            lanes[n] = load(b + (k * Vectors + n) * kLanes);
        }
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
            int pair;  // copied, because a row of bfloat16 may start at any even address
            std::memcpy(&pair, bases[r / 3] + r % 3 * row_stride, sizeof(pair));
            const Vec value = _mm512_castsi512_ps(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
            for (int n = 0; n < Vectors; ++n) {
                sums[r][n] = dot_pairs(sums[r][n], value, lanes[n]);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kBases; ++i) {
            bases[i] += step;
            asm("" : "+r"(bases[i]));
        }
    }
}
#endif

}  // namespace
}  // namespace rsvlm::RSVLM_ISA
