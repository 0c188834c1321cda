#include "rsvlm/rope.h"

#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr double kParallelFloats = 1 << 17;  // some 10 microseconds of work

template <class T>
inline __attribute__((always_inline)) void rotate(const T* x, const float* cosines, const float* sines, std::int64_t heads,
                                                  std::int64_t half, T* __restrict out) {
    for (std::int64_t head = 0; head < heads; ++head, x += 2 * half, out += 2 * half) {
        for (std::int64_t i = 0; i < half; ++i) {
            const float first = widen(x[i]), second = widen(x[half + i]);
            narrow(first * cosines[i] - second * sines[i], &out[i]);
            narrow(second * cosines[i] + first * sines[i], &out[half + i]);
        }
    }
}

RSVLM_MULTIVERSION
void rotate_tokens(const float* x, std::int64_t stride, const float* cosines, const float* sines, std::int64_t first,
                   std::int64_t stop, std::int64_t heads, std::int64_t half, float* out) {
    for (std::int64_t token = first; token < stop; ++token) {
        rotate(x + token * stride, cosines + token * half, sines + token * half, heads, half, out + token * heads * half * 2);
    }
}

RSVLM_MULTIVERSION
void rotate_tokens_bf16(const std::uint16_t* x, std::int64_t stride, const float* cosines, const float* sines,
                        std::int64_t first, std::int64_t stop, std::int64_t heads, std::int64_t half, std::uint16_t* out) {
    for (std::int64_t token = first; token < stop; ++token) {
        rotate(x + token * stride, cosines + token * half, sines + token * half, heads, half, out + token * heads * half * 2);
    }
}

}  // namespace

void rope(const void* x, std::int64_t token_stride, const float* cosines, const float* sines, std::int64_t tokens,
          std::int64_t heads, std::int64_t head_dim, Element element, void* out) {
    const int threads = threads_for(static_cast<double>(tokens * heads * head_dim), kParallelFloats);
    for_each_part(threads, threads, 0, [&](std::int64_t part, float*) {
        const std::int64_t first = tokens * part / threads, stop = tokens * (part + 1) / threads;
        if (element == Element::kBfloat16) {
            rotate_tokens_bf16(static_cast<const std::uint16_t*>(x), token_stride, cosines, sines, first, stop, heads,
                               head_dim / 2, static_cast<std::uint16_t*>(out));
        } else {
            rotate_tokens(static_cast<const float*>(x), token_stride, cosines, sines, first, stop, heads, head_dim / 2,
                          static_cast<float*>(out));
        }
    });
}

}  // namespace rsvlm
