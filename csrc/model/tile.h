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
    const char* ahead;  // the block that this thread will probably unpack next, to be fetched into the L2 cache meanwhile
};

struct TilePart {
    const void* x;               // [tokens, count] floats, pairs of bf16 or RowGroups
    std::int64_t tokens, count;  // count of those of a row
    const float* panel;
    float* out;                        // at the block's first column
    std::int64_t out_stride, present;  // rows of the block that exist
    const float *bias, *scale;         // at the block, or null
    bool add;
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

// One vector of sums -> out[lane..].
inline void finish(const TilePart& part, std::int64_t lane, Vec sum, float* out) {
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

}  // namespace
}  // namespace rsvlm::RSVLM_ISA
#endif
