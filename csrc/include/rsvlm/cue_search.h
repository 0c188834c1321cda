// The native twin of rsvlm_infer.ops.cue_search: exact top-k over float16 entries. Knows no Python, no texts.
#pragma once

#include <cstdint>
#include <vector>

namespace rsvlm {

struct CueSearch {
    const float* visual;           // [views, width]
    const float* query;            // [width] or null
    const std::uint16_t* entries;  // [count, width] float16
    std::int64_t views, width, count, k;
    double beta;
};

struct Cue {
    float score;
    std::int64_t row;
};

// The k best (fewer when there are fewer entries), best first, equal scores by the lowest row. A float32 pass bounds every
// score; only entries that can still be among the best are summed in float64, as the definition does.
std::vector<Cue> cue_search(const CueSearch& call);

}  // namespace rsvlm
