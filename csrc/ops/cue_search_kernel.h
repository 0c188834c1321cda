// The float32 pass of cue_search over some entries, for the instruction set of the simd header included before this file;
// without one, declarations only. Views are lanes, entries are broadcast; a few views, which would leave most lanes empty, are
// multiplied with each entry along the width instead.
#pragma once

#include <cstdint>

namespace rsvlm {

struct CuePart {
    const std::uint16_t* entries;
    const float* views;  // [tiles, width, lanes]: transposed, the last tile filled up with copies of the first view
    const float* query;  // [width] or null
    std::int64_t count, width, tiles;
    const float* rows;  // [few, width]: the views as they are, for cue_part_few
    std::int64_t few;
    float beta;
    float* scores;   // [count]
    float* squares;  // [count]: of the entries' lengths
    float* scratch;  // 8 * width floats
};

#define RSVLM_DECLARE_CUE_SEARCH(isa)       \
    namespace isa {                         \
    std::int64_t cue_lanes();               \
    void cue_part(const CuePart& part);     \
    void cue_part_few(const CuePart& part); \
    }
RSVLM_DECLARE_CUE_SEARCH(portable)
RSVLM_DECLARE_CUE_SEARCH(avx2)
RSVLM_DECLARE_CUE_SEARCH(avx512)
#undef RSVLM_DECLARE_CUE_SEARCH

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

inline void half_to_float(const std::uint16_t* from, std::int64_t count, float* to) {
    std::int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        store(to + i, load_half(from + i));
    }
    if (i < count) {
        std::uint16_t rest[kLanes] = {};
        for (std::int64_t j = i; j < count; ++j) {
            rest[j - i] = from[j];
        }
        store_partly(to + i, load_half(rest), count - i);
    }
}

inline float dot(const float* a, const float* b, std::int64_t count) {
    Vec sum = zero(), odd = zero();
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        sum = fma(load(a + i), load(b + i), sum);
        odd = fma(load(a + i + kLanes), load(b + i + kLanes), odd);
    }
    sum = add(sum, odd);
    for (; i + kLanes <= count; i += kLanes) {
        sum = fma(load(a + i), load(b + i), sum);
    }
    if (i < count) {
        sum = fma(load_partly(a + i, count - i), load_partly(b + i, count - i), sum);
    }
    return sum_lanes(sum);
}

}  // namespace

std::int64_t cue_lanes() { return kMaxVectors * kLanes; }

void cue_part_few(const CuePart& part) {
    const std::int64_t width = part.width;
    for (std::int64_t n = 0; n < part.count; ++n) {
        half_to_float(part.entries + n * width, width, part.scratch);
        float score = dot(part.scratch, part.rows, width);
        for (std::int64_t view = 1; view < part.few; ++view) {
            const float other = dot(part.scratch, part.rows + view * width, width);
            score = other > score ? other : score;
        }
        part.squares[n] = dot(part.scratch, part.scratch, width);
        part.scores[n] = part.query == nullptr ? score : score + part.beta * dot(part.scratch, part.query, width);
    }
}

void cue_part(const CuePart& part) {
    const std::int64_t width = part.width;
    for (std::int64_t first = 0; first < part.count; first += kRows) {
        const std::int64_t present = part.count - first < kRows ? part.count - first : kRows;
        half_to_float(part.entries + first * width, present * width, part.scratch);
        for (std::int64_t i = present * width; i < kRows * width; ++i) {
            part.scratch[i] = 0.0f;
        }
        Vec best[kRows];
        for (int r = 0; r < kRows; ++r) {
            best[r] = set1(-__builtin_inff());
        }
        for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
            Vec sums[kRows][kMaxVectors];
            for (int r = 0; r < kRows; ++r) {
                for (int n = 0; n < kMaxVectors; ++n) {
                    sums[r][n] = zero();
                }
            }
            multiply_tile<kRows, kMaxVectors>(part.scratch, width, 1, part.views + tile * width * kMaxVectors * kLanes, width,
                                              sums);
            for (int r = 0; r < kRows; ++r) {
                for (int n = 0; n < kMaxVectors; ++n) {
                    best[r] = max(best[r], sums[r][n]);
                }
            }
        }
        for (std::int64_t r = 0; r < present; ++r) {
            float lanes[kLanes];
            store(lanes, best[r]);
            float score = lanes[0];
            for (int lane = 1; lane < kLanes; ++lane) {
                score = lanes[lane] > score ? lanes[lane] : score;
            }
            const float* entry = part.scratch + r * width;
            part.squares[first + r] = dot(entry, entry, width);
            part.scores[first + r] = part.query == nullptr ? score : score + part.beta * dot(entry, part.query, width);
        }
    }
}

}  // namespace rsvlm::RSVLM_ISA
#endif
