#include "rsvlm/route.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "rsvlm/cpu.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kParallelLogits = 1 << 16;  // below, selection takes less time than waking threads

bool ranks_above(float a, float b) { return a > b || (a != a && b == b); }

// The k largest of `logits` in descending order, equal ones in order of place; k is small, so insertion beats a sort.
void select_largest(const float* logits, std::int64_t count, std::int64_t k, std::int32_t* places) {
    std::int64_t held = 0;
    for (std::int64_t place = 0; place < count; ++place) {
        if (held == k && !ranks_above(logits[place], logits[places[k - 1]])) {
            continue;
        }
        std::int64_t at = held < k ? held++ : k - 1;
        for (; at > 0 && ranks_above(logits[place], logits[places[at - 1]]); --at) {
            places[at] = places[at - 1];
        }
        places[at] = static_cast<std::int32_t>(place);
    }
}

void softmax(const float* logits, const std::int32_t* places, std::int64_t k, float* weights) {
    float sum = 0.0f;
    for (std::int64_t slot = 0; slot < k; ++slot) {
        weights[slot] = std::exp(logits[places[slot]] - logits[places[0]]);
        sum += weights[slot];
    }
    for (std::int64_t slot = 0; slot < k; ++slot) {
        weights[slot] /= sum;
    }
}

}  // namespace

void route(const float* logits, std::int64_t tokens, std::int64_t experts, const std::vector<std::int64_t>& level_offsets,
           std::int64_t k, const RouteOutputs& outputs) {
    const std::int64_t levels = static_cast<std::int64_t>(level_offsets.size()) - 1;
    if (levels < 1 || experts < 1 || experts % levels != 0) {
        throw std::invalid_argument("experts must be a positive multiple of levels, got " + std::to_string(experts) + " and " +
                                    std::to_string(levels) + "; give each level a group of the same size");
    }
    const std::int64_t group = experts / levels;
    if (k < 1 || k > group) {
        throw std::invalid_argument("k must be in 1.." + std::to_string(group) + ", the experts of one level, got " +
                                    std::to_string(k) + "; choose fewer experts per token");
    }
    if (level_offsets.front() != 0 || level_offsets.back() != tokens ||
        !std::is_sorted(level_offsets.begin(), level_offsets.end())) {
        throw std::invalid_argument("level_offsets must rise from 0 to " + std::to_string(tokens) + " tokens, got an end of " +
                                    std::to_string(level_offsets.back()) + "; pass prefix sums of the levels' row counts");
    }
    if (tokens * k > std::numeric_limits<std::int32_t>::max()) {
        throw std::invalid_argument("tokens times k must fit int32, got " + std::to_string(tokens * k) + "; split the batch");
    }
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(tokens * k));  // expert of each token's slot
    for (std::int64_t level = 0; level < levels; ++level) {
        const std::int64_t start = level_offsets[static_cast<std::size_t>(level)];
        const std::int64_t stop = level_offsets[static_cast<std::size_t>(level) + 1];
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if ((stop - start) * group > kParallelLogits)
#endif
        for (std::int64_t token = start; token < stop; ++token) {
            const float* own = logits + token * experts + level * group;
            std::int32_t* places = chosen.data() + token * k;
            select_largest(own, group, k, places);
            softmax(own, places, k, outputs.weights + token * k);
            for (std::int64_t slot = 0; slot < k; ++slot) {
                places[slot] += static_cast<std::int32_t>(level * group);
            }
        }
    }
    // A counting sort in order of tokens: ascending inside each expert whatever the number of threads was.
    std::fill_n(outputs.expert_offsets, experts + 1, 0);
    for (const std::int32_t expert : chosen) {
        ++outputs.expert_offsets[expert + 1];
    }
    for (std::int64_t expert = 0; expert < experts; ++expert) {
        outputs.expert_offsets[expert + 1] += outputs.expert_offsets[expert];
    }
    std::vector<std::int32_t> next(outputs.expert_offsets, outputs.expert_offsets + experts);
    for (std::size_t place = 0; place < chosen.size(); ++place) {
        outputs.permutation[next[static_cast<std::size_t>(chosen[place])]++] = static_cast<std::int32_t>(place);
    }
}

}  // namespace rsvlm
