#include "rsvlm/rms_norm.h"

#include <cmath>

#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kLanes = 32;          // partial sums: two vectors of AVX-512
constexpr double kParallelFloats = 1 << 17;  // some 10 microseconds of work

template <class T>
inline __attribute__((always_inline)) void norm_row(const T* x, const T* weight, std::int64_t width, float eps, T* out) {
    float sums[kLanes] = {};
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        for (std::int64_t lane = 0; lane < kLanes; ++lane) {
            const float value = widen(x[i + lane]);
            sums[lane] += value * value;
        }
    }
    for (; i < width; ++i) {
        const float value = widen(x[i]);
        sums[i % kLanes] += value * value;
    }
    for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            sums[lane] += sums[lane + half];
        }
    }
    const float factor = 1.0f / std::sqrt(sums[0] / static_cast<float>(width) + eps);
    for (i = 0; i < width; ++i) {
        T normed;  // rounded before the weight, as the definition says
        narrow(widen(x[i]) * factor, &normed);
        narrow(widen(weight[i]) * widen(normed), &out[i]);
    }
}

RSVLM_MULTIVERSION
void norm_rows(const float* x, const float* weight, std::int64_t first, std::int64_t stop, std::int64_t width, float eps,
               float* out) {
    for (std::int64_t row = first; row < stop; ++row) {
        norm_row(x + row * width, weight, width, eps, out + row * width);
    }
}

RSVLM_MULTIVERSION
void norm_rows_bf16(const std::uint16_t* x, const std::uint16_t* weight, std::int64_t first, std::int64_t stop,
                    std::int64_t width, float eps, std::uint16_t* out) {
    for (std::int64_t row = first; row < stop; ++row) {
        norm_row(x + row * width, weight, width, eps, out + row * width);
    }
}

}  // namespace

void rms_norm(const void* x, const void* weight, std::int64_t rows, std::int64_t width, float eps, Element element, void* out) {
    const int threads = threads_for(static_cast<double>(rows * width), kParallelFloats);
    for_each_part(threads, threads, 0, [&](std::int64_t part, float*) {
        const std::int64_t first = rows * part / threads, stop = rows * (part + 1) / threads;
        if (element == Element::kBfloat16) {
            norm_rows_bf16(static_cast<const std::uint16_t*>(x), static_cast<const std::uint16_t*>(weight), first, stop, width,
                           eps, static_cast<std::uint16_t*>(out));
        } else {
            norm_rows(static_cast<const float*>(x), static_cast<const float*>(weight), first, stop, width, eps,
                      static_cast<float*>(out));
        }
    });
}

}  // namespace rsvlm
