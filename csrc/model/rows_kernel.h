// What happens to rows between products: norms, activations, rotation, rounding; for the instruction set of the simd header
// included before this file; without one, declarations only. Rows come as floats and leave as floats or bf16.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"
#include "rsvlm/scene_model.h"

namespace rsvlm {

// Everything after `width` of a row stays as it is.
struct NormPart {
    const float* x;
    const float *weight, *bias;  // bias null = root mean square norm, else mean and variance
    std::int64_t width;
    float eps;
    void* out;
    Element element;
};

// The first `width` columns of x [rows, x_stride] -> a part of wider rows.
struct BlockPart {
    const float* x;
    std::int64_t rows, x_stride, width;
    Element element;
    void* out;
    std::int64_t out_stride;  // in elements
};

#define RSVLM_DECLARE_ROWS(isa)                                                                                               \
    namespace isa {                                                                                                           \
    void norm_row(const NormPart& part);                                                                                      \
    void convert_row(const float* x, std::int64_t width, Element element, void* out);                                         \
    void gate_row(const float* gate, const float* up, std::int64_t width, Element element, void* out);                        \
    void activate_row(const float* x, std::int64_t width, Activation activation, Element element, void* out);                 \
    void convert_block(const BlockPart& part);                                                                                \
    void gate_block(const float* pairs, std::int64_t rows, float* out);                                                       \
    void widen_row(const std::uint16_t* x, std::int64_t width, float* out);                                                   \
    void rotate_row(const float* x, const float* cosines, const float* sines, std::int64_t half, Element element, void* out); \
    void add_row(const float* x, std::int64_t width, float factor, float* to);                                                \
    }
RSVLM_DECLARE_ROWS(portable)
RSVLM_DECLARE_ROWS(avx2)
RSVLM_DECLARE_ROWS(avx512)
RSVLM_DECLARE_ROWS(avx512_bf16)
#undef RSVLM_DECLARE_ROWS

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

template <class T>
inline Vec load_up_to(const T* from, std::int64_t count) {
    return count >= kLanes ? load_float(from) : load_partly(from, count);
}

// out[i] = function(i, count) for vectors of `count` lanes.
template <class T, class Function>
inline __attribute__((always_inline)) void for_vectors(std::int64_t width, T* out, const Function& function) {
    for (std::int64_t i = 0; i < width; i += kLanes) {
        const std::int64_t count = width - i < kLanes ? width - i : kLanes;
        store_first(out + i, function(i, count), count);
    }
}

template <class Function>
inline __attribute__((always_inline)) void write_row(std::int64_t width, Element element, void* out, const Function& function) {
    if (element == Element::kBfloat16) {
        for_vectors(width, static_cast<std::uint16_t*>(out), function);
    } else {
        for_vectors(width, static_cast<float*>(out), function);
    }
}

// x - shift, zero beyond `count` lanes.
inline Vec centred(const float* x, std::int64_t count, Vec shift) {
    if (count >= kLanes) {
        return sub(load(x), shift);
    }
    float lanes[kLanes] = {};
    store_partly(lanes, sub(load_partly(x, count), shift), count);
    return load(lanes);
}

// Sum of a row by add(i, count, sum) -> sum with the `count` values from i on, in four chains: one would wait for each
// addition.
template <class Add>
inline __attribute__((always_inline)) float sum_row(std::int64_t width, const Add& add_vector) {
    Vec sums[4] = {zero(), zero(), zero(), zero()};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int chain = 0; chain < 4; ++chain) {
            sums[chain] = add_vector(i + chain * kLanes, std::int64_t{kLanes}, sums[chain]);
        }
    }
    for (; i < width; i += kLanes) {
        sums[0] = add_vector(i, width - i < kLanes ? width - i : kLanes, sums[0]);
    }
    return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

inline float mean_square(const float* x, std::int64_t width, float mean) {
    const Vec shift = set1(mean);
    return sum_row(width,
                   [&](std::int64_t i, std::int64_t count, Vec sum) __attribute__((always_inline)) {
                       const Vec value = centred(x + i, count, shift);
                       return fma(value, value, sum);
                   }) /
           static_cast<float>(width);
}

inline Vec sigmoid_times(Vec x, Vec argument) { return div(x, add(set1(1.0f), exp2(mul(argument, set1(-kLog2E))))); }

}  // namespace

void norm_row(const NormPart& part) {
    float mean = 0.0f;
    if (part.bias != nullptr) {
        const float sum =
            sum_row(part.width, [&](std::int64_t i, std::int64_t count, Vec so_far)
                                    __attribute__((always_inline)) { return add(so_far, load_up_to(part.x + i, count)); });
        mean = sum / static_cast<float>(part.width);
    }
    const Vec shift = set1(mean);
    const Vec factor = set1(1.0f / __builtin_sqrtf(mean_square(part.x, part.width, mean) + part.eps));
    write_row(part.width, part.element, part.out, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        const Vec normed = mul(sub(load_up_to(part.x + i, count), shift), factor);
        const Vec weight = load_up_to(part.weight + i, count);
        return part.bias == nullptr ? mul(normed, weight) : fma(normed, weight, load_up_to(part.bias + i, count));
    });
}

void convert_row(const float* x, std::int64_t width, Element element, void* out) {
    write_row(width, element, out,
              [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) { return load_up_to(x + i, count); });
}

void gate_row(const float* gate, const float* up, std::int64_t width, Element element, void* out) {
    write_row(width, element, out, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        return mul(silu(load_up_to(gate + i, count)), load_up_to(up + i, count));
    });
}

// [rows, 32 gates | 32 ups] -> [rows, 32], which may be the same memory.
void gate_block(const float* pairs, std::int64_t rows, float* out) {
    for (std::int64_t row = 0; row < rows; ++row, pairs += 64, out += 32) {
        gate_row(pairs, pairs + 32, 32, Element::kFloat32, out);
    }
}

void convert_block(const BlockPart& part) {
    const float* x = part.x;
#ifdef RSVLM_DOT_BF16
    if (part.element == Element::kBfloat16 && part.width == 2 * kLanes) {
        auto* to = static_cast<std::uint16_t*>(part.out);
        for (std::int64_t row = 0; row < part.rows; ++row, x += part.x_stride, to += part.out_stride) {
            _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(load(x + kLanes), load(x)));
        }
        return;
    }
#endif
    const std::int64_t bytes = part.element == Element::kBfloat16 ? 2 : 4;
    char* out = static_cast<char*>(part.out);
    for (std::int64_t row = 0; row < part.rows; ++row, x += part.x_stride, out += part.out_stride * bytes) {
        convert_row(x, part.width, part.element, out);
    }
}

void widen_row(const std::uint16_t* x, std::int64_t width, float* out) {
    for_vectors(width, out,
                [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) { return load_up_to(x + i, count); });
}

void activate_row(const float* x, std::int64_t width, Activation activation, Element element, void* out) {
    if (activation == Activation::kGelu && element == Element::kFloat32) {
        constexpr int kAtOnce = kLanes == 16 ? 8 : 2;
        auto* to = static_cast<float*>(out);
        for (; width >= kAtOnce * kLanes; width -= kAtOnce * kLanes, x += kAtOnce * kLanes, to += kAtOnce * kLanes) {
            Vec values[kAtOnce];
#pragma GCC unroll 8
            for (int i = 0; i < kAtOnce; ++i) {
                values[i] = load(x + i * kLanes);
            }
            gelu<kAtOnce>(values);
#pragma GCC unroll 8
            for (int i = 0; i < kAtOnce; ++i) {
                store(to + i * kLanes, values[i]);
            }
        }
        out = to;
    }
    write_row(width, element, out, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        const Vec value = load_up_to(x + i, count);
        if (activation == Activation::kGelu) {
            return gelu(value);
        }
        if (activation == Activation::kQuickGelu) {
            return sigmoid_times(value, mul(value, set1(1.702f)));
        }
        // x/2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        const Vec cube = mul(mul(value, value), value);
        return sigmoid_times(value, mul(fma(cube, set1(0.044715f), value), set1(2.0f * 0.7978845608f)));
    });
}

void rotate_row(const float* x, const float* cosines, const float* sines, std::int64_t half, Element element, void* out) {
    const auto rotate = [&](auto* to) __attribute__((always_inline)) {
        for_vectors(half, to, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
            const Vec first = load_up_to(x + i, count), second = load_up_to(x + half + i, count);
            return sub(mul(first, load_up_to(cosines + i, count)), mul(second, load_up_to(sines + i, count)));
        });
        for_vectors(half, to + half, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
            const Vec first = load_up_to(x + i, count), second = load_up_to(x + half + i, count);
            return add(mul(second, load_up_to(cosines + i, count)), mul(first, load_up_to(sines + i, count)));
        });
    };
    if (element == Element::kBfloat16) {
        rotate(static_cast<std::uint16_t*>(out));
    } else {
        rotate(static_cast<float*>(out));
    }
}

void add_row(const float* x, std::int64_t width, float factor, float* to) {
    const Vec scale = set1(factor);
    for_vectors(width, to, [&](std::int64_t i, std::int64_t count) __attribute__((always_inline)) {
        return fma(load_up_to(x + i, count), scale, load_up_to(to + i, count));
    });
}

}  // namespace rsvlm::RSVLM_ISA
#endif
