#include "rsvlm/cue_search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "cue_search_kernel.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kPartEntries = 256;
constexpr std::int64_t kFewShare = 4;  // up to a quarter of the lanes, a product along the width takes fewer instructions

struct Kernels {
    std::int64_t (*lanes)();
    void (*part)(const CuePart&);
    void (*few)(const CuePart&);
};

Kernels choose_kernels() {
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
        case Isa::kAvx512:
            return {avx512::cue_lanes, avx512::cue_part, avx512::cue_part_few};
        case Isa::kAvx2:
            return {avx2::cue_lanes, avx2::cue_part, avx2::cue_part_few};
#endif
        default:
            return {portable::cue_lanes, portable::cue_part, portable::cue_part_few};
    }
}

double widen_half(std::uint16_t half) {
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double value = exponent == 0    ? std::ldexp(mantissa, -24)
                         : exponent == 31 ? (mantissa != 0 ? std::nan("") : HUGE_VAL)
                                          : std::ldexp(mantissa + 1024, exponent - 25);
    return (half & 0x8000) != 0 ? -value : value;
}

double length(const float* values, std::int64_t count) {
    double square = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        square += static_cast<double>(values[i]) * values[i];
    }
    return std::sqrt(square);
}

float exact_score(const CueSearch& call, std::int64_t row, std::vector<double>& entry) {
    for (std::int64_t i = 0; i < call.width; ++i) {
        entry[static_cast<std::size_t>(i)] = widen_half(call.entries[row * call.width + i]);
    }
    const auto dot = [&](const float* other) {
        double sum = 0;
        for (std::int64_t i = 0; i < call.width; ++i) {
            sum += entry[static_cast<std::size_t>(i)] * static_cast<double>(other[i]);
        }
        return sum;
    };
    double best = dot(call.visual);
    for (std::int64_t view = 1; view < call.views; ++view) {
        best = std::max(best, dot(call.visual + view * call.width));
    }
    return static_cast<float>(call.query == nullptr ? best : best + call.beta * dot(call.query));
}

}  // namespace

std::vector<Cue> cue_search(const CueSearch& call) {
    const std::int64_t k = std::min(call.k, call.count);
    if (k < 1) {
        return {};
    }
    const Kernels kernels = choose_kernels();
    const std::int64_t lanes = kernels.lanes();
    const bool few = call.views * kFewShare <= lanes;
    const std::int64_t tiles = few ? 0 : (call.views + lanes - 1) / lanes;
    std::vector<float> views(static_cast<std::size_t>(tiles * call.width * lanes));
    double longest = 0;
    for (std::int64_t view = 0; view < call.views; ++view) {
        longest = std::max(longest, length(call.visual + view * call.width, call.width));
    }
    for (std::int64_t place = 0; place < tiles * lanes; ++place) {
        const float* view = call.visual + (place < call.views ? place : 0) * call.width;
        for (std::int64_t i = 0; i < call.width; ++i) {
            views[static_cast<std::size_t>((place / lanes * call.width + i) * lanes + place % lanes)] = view[i];
        }
    }
    std::vector<float> scores(static_cast<std::size_t>(call.count)), squares(scores.size());
    const double products = static_cast<double>(call.count) * static_cast<double>(call.width * call.views);
    const std::int64_t parts = (call.count + kPartEntries - 1) / kPartEntries;
    const auto scratch_floats = static_cast<std::size_t>(8 * call.width);
    for_each_part(parts, threads_for(products), scratch_floats, [&](std::int64_t part, float* scratch) {
        const std::int64_t first = part * kPartEntries;
        (few ? kernels.few
             : kernels.part)({call.entries + first * call.width, views.data(), call.query,
                              std::min(kPartEntries, call.count - first), call.width, tiles, call.visual, call.views,
                              static_cast<float>(call.beta), scores.data() + first, squares.data() + first, scratch});
    });
    // |float32 score - exact score| is at most (width + a few) roundings of |entry| (|view| + |beta| |query|); the few are the
    // sum, the conversion of beta and the final rounding, whose ties must stay ties.
    const double asked = call.query == nullptr ? 0.0 : std::abs(call.beta) * length(call.query, call.width);
    const double unit = static_cast<double>(call.width + 16) * 0x1p-23 * (longest + asked);
    const auto slack = [&](std::size_t row) { return unit * std::sqrt(static_cast<double>(squares[row])) * 1.001 + 1e-37; };
    std::vector<double> lowest(scores.size());
    for (std::size_t row = 0; row < scores.size(); ++row) {
        lowest[row] = scores[row] - slack(row);
    }
    std::nth_element(lowest.begin(), lowest.begin() + (k - 1), lowest.end(), std::greater<double>());
    const double threshold = lowest[static_cast<std::size_t>(k - 1)];
    std::vector<Cue> found;
    std::vector<double> entry(static_cast<std::size_t>(call.width));
    for (std::size_t row = 0; row < scores.size(); ++row) {
        if (!(scores[row] + slack(row) < threshold)) {
            const auto place = static_cast<std::int64_t>(row);
            found.push_back({exact_score(call, place, entry), place});
        }
    }
    std::stable_sort(found.begin(), found.end(), [](const Cue& a, const Cue& b) { return a.score > b.score; });
    found.resize(static_cast<std::size_t>(k));
    return found;
}

}  // namespace rsvlm
