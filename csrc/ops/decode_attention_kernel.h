// One new token, one key-value head and one chunk of the cache, for the instruction set of the simd header included before this
// file; without one, declarations only. All query heads of the group share each key and value while it is in the L1 cache.
#pragma once

#include <cstdint>

namespace rsvlm {

constexpr std::int64_t kDecodeChunk = 256;  // keys per part: fixed, so that results do not depend on the number of threads

struct DecodePart {
    const void* q;      // first query head of the group
    const void *k, *v;  // first key of the chunk
    const bool* mask;   // of the chunk, or null
    std::int64_t q_head_stride, k_row_stride, v_row_stride;
    std::int64_t group, keys, head_dim;
    float scale;      // log2(e) included
    float* partials;  // [group, head_dim + 2]: largest score, sum of weights, weighted values
    float* scratch;   // decode_scratch_floats(group, head_dim) floats
};

inline std::int64_t decode_scratch_floats(std::int64_t group, std::int64_t head_dim) {
    return group * (head_dim + 16) + kDecodeChunk + 16;
}

#define RSVLM_DECLARE_DECODE(isa)                  \
    namespace isa {                                \
    void decode_part_fp32(const DecodePart& part); \
    void decode_part_bf16(const DecodePart& part); \
    }
RSVLM_DECLARE_DECODE(portable)
RSVLM_DECLARE_DECODE(avx2)
RSVLM_DECLARE_DECODE(avx512)
#undef RSVLM_DECLARE_DECODE

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

template <class T>
inline Vec load_up_to(const T* from, std::int64_t count) {
    return count >= kLanes ? load_float(from) : load_partly(from, count);
}

// `Vectors` neighbouring vectors of a head's weighted sum of values.
template <int Vectors, class T>
inline void sum_values(const T* v, std::int64_t stride, const float* weights, std::int64_t keys, std::int64_t width,
                       float* out) {
    Vec sums[Vectors];
    for (int n = 0; n < Vectors; ++n) {
        sums[n] = zero();
    }
    for (std::int64_t key = 0; key < keys; ++key) {
        const Vec weight = set1(weights[key]);
        for (int n = 0; n < Vectors; ++n) {
            sums[n] = fma(weight, load_up_to(v + key * stride + n * kLanes, width - n * kLanes), sums[n]);
        }
    }
    for (int n = 0; n < Vectors; ++n) {
        const std::int64_t left = width - n * kLanes;
        store_first(out + n * kLanes, sums[n], left < kLanes ? left : kLanes);
    }
}

template <class T>
void run_part(const DecodePart& part) {
    const std::int64_t dim = part.head_dim, padded = (dim + kLanes - 1) / kLanes * kLanes;
    float* scores = part.scratch;
    float* queries = scores + kDecodeChunk + 16;
    const T *k = static_cast<const T*>(part.k), *v = static_cast<const T*>(part.v);
    const float minus_infinity = -__builtin_inff();
    for (std::int64_t head = 0; head < part.group; ++head) {
        copy_as_float(static_cast<const T*>(part.q) + head * part.q_head_stride, dim, padded, queries + head * padded);
    }
    for (std::int64_t head = 0; head < part.group; ++head) {
        const float* q = queries + head * padded;
        float* partial = part.partials + head * (dim + 2);
        for (std::int64_t key = 0; key < part.keys; ++key) {
            const T* row = k + key * part.k_row_stride;
            Vec even = zero(), odd = zero();
            std::int64_t i = 0;
            for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
                even = fma(load(q + i), load_float(row + i), even);
                odd = fma(load(q + i + kLanes), load_float(row + i + kLanes), odd);
            }
            for (; i < dim; i += kLanes) {
                even = fma(load(q + i), load_up_to(row + i, dim - i), even);
            }
            scores[key] = part.mask == nullptr || part.mask[key] ? sum_lanes(add(even, odd)) * part.scale : minus_infinity;
        }
        for (std::int64_t key = part.keys; key % kLanes != 0; ++key) {
            scores[key] = minus_infinity;
        }
        Vec largest = set1(minus_infinity);
        for (std::int64_t key = 0; key < part.keys; key += kLanes) {
            largest = max(load(scores + key), largest);
        }
        float lanes[kLanes];
        store(lanes, largest);
        float maximum = lanes[0];
        for (int lane = 1; lane < kLanes; ++lane) {
            maximum = lanes[lane] > maximum ? lanes[lane] : maximum;
        }
        const Vec base = set1(maximum == minus_infinity ? 0.0f : maximum);
        Vec sum = zero();
        for (std::int64_t key = 0; key < part.keys; key += kLanes) {
            const Vec weight = exp2(sub(load(scores + key), base));
            sum = add(sum, weight);
            store(scores + key, weight);
        }
        partial[0] = maximum;
        partial[1] = sum_lanes(sum);
        std::int64_t i = 0;
        for (; i + 4 * kLanes <= dim; i += 4 * kLanes) {
            sum_values<4>(v + i, part.v_row_stride, scores, part.keys, 4 * kLanes, partial + 2 + i);
        }
        for (; i < dim; i += kLanes) {
            sum_values<1>(v + i, part.v_row_stride, scores, part.keys, dim - i, partial + 2 + i);
        }
    }
}

}  // namespace

void decode_part_fp32(const DecodePart& part) { run_part<float>(part); }
void decode_part_bf16(const DecodePart& part) { run_part<std::uint16_t>(part); }

}  // namespace rsvlm::RSVLM_ISA
#endif
