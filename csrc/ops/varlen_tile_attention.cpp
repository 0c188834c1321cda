#include "rsvlm/varlen_tile_attention.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "attention_kernels.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kMaxHeadDim = 1024;
constexpr std::int64_t kPartQueries = 96;  // each part copies K and V, which 96 queries make small against their products

struct Part {
    std::int64_t tile, head, first, stop;
};

void check_bounds(const char* name, const std::vector<std::int64_t>& bounds) {
    if (bounds.empty() || bounds.front() != 0 || !std::is_sorted(bounds.begin(), bounds.end())) {
        throw std::invalid_argument(std::string(name) +
                                    " must be prefix sums that rise from 0; pass the tiles' lengths summed");
    }
}

// Parts in order of cost, longest first, so that the last thread to finish holds a short one. A tile's queries are split only
// when there are too few (tile, head) pairs to keep the threads busy.
std::vector<Part> plan_parts(std::int64_t heads, const std::vector<std::int64_t>& bounds,
                             const std::vector<std::int64_t>& key_bounds, double products, int threads) {
    const std::int64_t tiles = static_cast<std::int64_t>(bounds.size()) - 1;
    const auto length = [&](std::int64_t tile) { return bounds[tile + 1] - bounds[tile]; };
    const auto pairs = [&](std::int64_t tile) {
        return static_cast<double>(length(tile)) * static_cast<double>(key_bounds[tile + 1] - key_bounds[tile]);
    };
    std::vector<std::int64_t> order(static_cast<std::size_t>(tiles));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return pairs(a) > pairs(b); });
    std::vector<Part> parts;
    for (const std::int64_t tile : order) {
        std::int64_t pieces = 1;
        if (threads > 1 && products > 0) {
            const double share = pairs(tile) * 4.0 * threads / products;  // of a quarter of one thread's work
            pieces = std::clamp<std::int64_t>(static_cast<std::int64_t>(share), 1,
                                              std::max<std::int64_t>(1, length(tile) / kPartQueries));
        }
        const std::int64_t step =
            ((length(tile) + pieces - 1) / pieces + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
        for (std::int64_t head = 0; head < heads; ++head) {
            for (std::int64_t first = bounds[tile]; first < bounds[tile + 1]; first += pieces == 1 ? length(tile) : step) {
                parts.push_back({tile, head, first, pieces == 1 ? bounds[tile + 1] : std::min(first + step, bounds[tile + 1])});
            }
        }
    }
    return parts;
}

}  // namespace

void varlen_tile_attention(const TileAttention& call, const std::vector<std::int64_t>& bounds,
                           const std::vector<std::int64_t>& key_bounds) {
    check_bounds("cu_seqlens", bounds);
    check_bounds("cu_seqlens_k", key_bounds);
    if (bounds.size() != key_bounds.size()) {
        throw std::invalid_argument("cu_seqlens and cu_seqlens_k must have one length, got " + std::to_string(bounds.size()) +
                                    " and " + std::to_string(key_bounds.size()) + "; give each tile of queries its keys");
    }
    if (call.heads < 1 || call.head_dim < 1 || call.head_dim > kMaxHeadDim) {
        throw std::invalid_argument("heads must be at least 1 and head_dim in 1..1024, got " + std::to_string(call.heads) +
                                    " and " + std::to_string(call.head_dim) + "; use the eager op for other shapes");
    }
    double pairs = 0;
    std::int64_t longest = 0;
    for (std::size_t tile = 0; tile + 1 < bounds.size(); ++tile) {
        const std::int64_t keys = key_bounds[tile + 1] - key_bounds[tile];
        pairs += static_cast<double>(bounds[tile + 1] - bounds[tile]) * static_cast<double>(keys);
        longest = std::max(longest, keys);
    }
    const double products = pairs * static_cast<double>(call.heads * call.head_dim);
    const int threads = call.threads > 0 ? std::min(call.threads, threads_for(products)) : threads_for(products);
    const std::vector<Part> parts =
        plan_parts(call.heads, bounds, key_bounds, pairs * static_cast<double>(call.heads), threads);
    const auto kernel = attention_kernel(call.element);
    const std::int64_t size = call.element == Element::kBfloat16 ? 2 : 4, out_stride = call.heads * call.head_dim;
    const auto at = [size](const HeadRows& rows, std::int64_t row, std::int64_t head) -> const void* {
        return static_cast<const char*>(rows.data) + (row * rows.row_stride + head * rows.head_stride) * size;
    };
    const auto scratch_floats = static_cast<std::size_t>(attention_scratch_floats(longest, call.head_dim));
    for_each_part(static_cast<std::int64_t>(parts.size()), threads, scratch_floats, [&](std::int64_t i, float* scratch) {
        const Part& part = parts[static_cast<std::size_t>(i)];
        const std::int64_t key = key_bounds[static_cast<std::size_t>(part.tile)];
        const std::int64_t keys = key_bounds[static_cast<std::size_t>(part.tile) + 1] - key;
        char* out = static_cast<char*>(call.out) + (part.first * out_stride + part.head * call.head_dim) * size;
        if (keys == 0) {
            for (std::int64_t row = 0; row < part.stop - part.first; ++row) {
                std::fill_n(out + row * out_stride * size, call.head_dim * size, '\0');
            }
            return;
        }
        kernel({at(call.q, part.first, part.head), at(call.k, key, part.head), at(call.v, key, part.head), out,
                call.q.row_stride, call.k.row_stride, call.v.row_stride, out_stride, part.stop - part.first, keys,
                call.head_dim, call.scale * 1.44269504088896341f, scratch});
    });
}

}  // namespace rsvlm
