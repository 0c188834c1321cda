// Functions over Vec that need no instruction of their own. Included by portable.h, avx2.h and avx512.h, never alone.
#pragma once

namespace rsvlm::RSVLM_ISA {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// 2^f = 1 + f * P(f) on [-1/2, 1/2], minimax: relative error 2e-9 before rounding, below 1.2 ulp after (0.94 with FMA).
inline Vec exp2_fraction(Vec f) {
    Vec p = set1(1.535336196e-04f);
    p = fma(p, f, set1(1.339887502e-03f));
    p = fma(p, f, set1(9.618436918e-03f));
    p = fma(p, f, set1(5.550332367e-02f));
    p = fma(p, f, set1(2.402264774e-01f));
    p = fma(p, f, set1(6.931471825e-01f));
    return fma(p, f, set1(1.0f));
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

// x/2 * (1 + erf(x / sqrt 2)). erf: x * P(x^2) below 1, 1 - 2^(t * Q(t)) above, both minimax with errors near 1e-9.
inline Vec gelu(Vec x) {
    const Vec scaled = mul(x, set1(0.70710678118654752f));
    const Vec square = mul(scaled, scaled);
    Vec near = set1(7.853903662e-05f);
    near = fma(near, square, set1(-8.010207675e-04f));
    near = fma(near, square, set1(5.188329611e-03f));
    near = fma(near, square, set1(-2.685381286e-02f));
    near = fma(near, square, set1(1.128358543e-01f));
    near = fma(near, square, set1(-3.761262596e-01f));
    near = mul(fma(near, square, set1(1.128379107e+00f)), scaled);
    const Vec t = min(set1(4.0f), abs(scaled));  // above, 1 - erf is below a rounding of 1 and counts as 0
    Vec far = set1(-2.457648770e-05f);
    far = fma(far, t, set1(5.495649530e-04f));
    far = fma(far, t, set1(-5.596463569e-03f));
    far = fma(far, t, set1(3.500592709e-02f));
    far = fma(far, t, set1(-1.541127264e-01f));
    far = fma(far, t, set1(-9.158148766e-01f));
    far = fma(far, t, set1(-1.628423572e+00f));
    far = select_greater(set1(4.0f), abs(scaled), exp2(mul(far, t)), zero());  // 1 - erf(|x| / sqrt 2)
    // 1 + erf without cancellation below zero
    far = select_greater(x, zero(), sub(set1(2.0f), far), far);
    const Vec one_plus_erf = select_greater(abs(scaled), set1(1.0f), far, add(set1(1.0f), near));
    return mul(mul(set1(0.5f), x), one_plus_erf);
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
