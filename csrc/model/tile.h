// What products of many rows share: a block of 32 rows of a weight as a panel, rows of x, and what becomes of the sums. For the
// instruction set of the simd header included before this file; without one, declarations only.
#pragma once

#include <cstdint>

#include "rsvlm/linear.h"

namespace rsvlm {

constexpr std::int64_t kPanelRows = 32;
constexpr std::int64_t kPanelGroup = 32;

struct PanelPart {
    LinearKind kind;
    const char* block;
    std::int64_t groups;  // of 32 columns
    float* panel;
};

struct TilePart {
    const void* x;               // [tokens, count] floats, pairs of bf16 or RowGroups
    std::int64_t tokens, count;  // count of those of a row
    const float* panel;
    float* out;                        // at the block's first column
    std::int64_t out_stride, present;  // rows of the block that exist
    const float *bias, *scale;         // at the block, or null
    bool add;
    const char* ahead;  // what this thread will probably unpack next, to be fetched into the L2 cache meanwhile
    std::int64_t ahead_bytes;
};

}  // namespace rsvlm

#ifdef RSVLM_ISA
namespace rsvlm::RSVLM_ISA {
namespace {

// Asks for some cache lines in the L2 cache; an address that is nowhere does no harm.
inline void fetch(const char* from, std::int64_t bytes) {
    for (std::int64_t line = 0; line < bytes; line += 64) {
        __builtin_prefetch(from + line, 0, 2);
    }
}

// What is to be fetched ahead, a share per register tile of `rows`: all at once, it would keep the unpacking waiting.
class FetchAhead {
  public:
    FetchAhead(const TilePart& part, std::int64_t rows)
        : next_(part.ahead),
          stop_(part.ahead + part.ahead_bytes),
          share_((part.ahead_bytes * rows / (part.tokens < rows ? rows : part.tokens) + 63) / 64 * 64) {}

    void share() {
        const std::int64_t left = stop_ - next_;
        fetch(next_, left < share_ ? left : share_);
        next_ += left < share_ ? left : share_;
    }

  private:
    const char *next_, *stop_;
    std::int64_t share_;
};

// One vector of sums -> out[lane..].
__attribute__((noinline)) void finish(const TilePart& part, std::int64_t lane, Vec sum, float* out) {
    const std::int64_t left = part.present - lane, count = left < kLanes ? left : kLanes;
    if (count <= 0) {
        return;
    }
    if (part.bias != nullptr) {
        sum = add(sum, count == kLanes ? load(part.bias + lane) : load_partly(part.bias + lane, count));
    }
    if (part.scale != nullptr) {
        sum = mul(sum, count == kLanes ? load(part.scale + lane) : load_partly(part.scale + lane, count));
    }
    if (part.add) {
        sum = add(sum, count == kLanes ? load(out + lane) : load_partly(out + lane, count));
    }
    store_first(out + lane, sum, count);
}

// finish() of the vectors at `lane` and behind it of all rows of a register tile. Everything is unrolled, because an index that
// the compiler does not know would keep all sums of the products' loop in memory.
template <int Rows>
inline __attribute__((always_inline)) void finish_tile(const TilePart& part, std::int64_t token, std::int64_t lane,
                                                       Vec (&sums)[Rows][2]) {
    float* out = part.out + token * part.out_stride + lane;
    if (part.present - lane < 2 * kLanes) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            finish(part, lane, sums[r][0], out - lane + r * part.out_stride);
            finish(part, lane + kLanes, sums[r][1], out - lane + r * part.out_stride);
        }
        return;
    }
    if (part.bias != nullptr) {
        const Vec low = load(part.bias + lane), high = load(part.bias + lane + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            sums[r][0] = add(sums[r][0], low);
            sums[r][1] = add(sums[r][1], high);
        }
    }
    if (part.scale != nullptr) {
        const Vec low = load(part.scale + lane), high = load(part.scale + lane + kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            sums[r][0] = mul(sums[r][0], low);
            sums[r][1] = mul(sums[r][1], high);
        }
    }
    if (part.add) {
#pragma GCC unroll 12
        for (int r = 0; r < Rows; ++r) {
            sums[r][0] = add(sums[r][0], load(out + r * part.out_stride));
            sums[r][1] = add(sums[r][1], load(out + r * part.out_stride + kLanes));
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
        store(out + r * part.out_stride, sums[r][0]);
        store(out + r * part.out_stride + kLanes, sums[r][1]);
    }
}

}  // namespace
}  // namespace rsvlm::RSVLM_ISA
#endif
