#include "rsvlm/decode_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_kernels.h"
#include "rsvlm/bfloat16.h"
#include "rsvlm/parallel.h"
#include "rsvlm/scratch.h"

namespace rsvlm {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr double kParallelProducts = 1 << 18;  // some 10 microseconds: a cache is read at the speed of memory
constexpr std::int64_t kPrefillTokens = 8;     // from so many new tokens on, blocks of queries beat one query at a time
constexpr std::int64_t kPrefillPart = 96;      // queries that share one copy of keys and values

const void* at(const BatchRows& rows, Element element, std::int64_t batch, std::int64_t row, std::int64_t head) {
    const std::int64_t size = element == Element::kBfloat16 ? 2 : 4;
    return static_cast<const char*>(rows.data) +
           (batch * rows.batch_stride + row * rows.row_stride + head * rows.head_stride) * size;
}

// Chunks of one head in order of keys -> its output.
template <class T>
void join_chunks(const float* partials, std::int64_t chunks, std::int64_t chunk_stride, std::int64_t dim, float* sums, T* out) {
    float maximum = -std::numeric_limits<float>::infinity();
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        maximum = std::max(maximum, partials[chunk * chunk_stride]);
    }
    const float base = std::isinf(maximum) && maximum < 0 ? 0.0f : maximum;
    std::fill_n(sums, dim, 0.0f);
    float total = 0.0f;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const float* partial = partials + chunk * chunk_stride;
        const float factor = std::exp2(partial[0] - base);
        total += partial[1] * factor;
        for (std::int64_t i = 0; i < dim; ++i) {
            sums[i] += partial[2 + i] * factor;
        }
    }
    const float divisor = total == 0.0f ? 1.0f : total;  // a token that its mask lets see nothing gets zeros
    for (std::int64_t i = 0; i < dim; ++i) {
        narrow(sums[i] / divisor, &out[i]);
    }
}

// One query at a time; the cache is split into chunks so that even one token of one row keeps several threads busy.
void decode(const DecodeAttention& call, int threads) {
    struct Part {
        std::int64_t batch, token, head, chunk, keys, place;
    };
    const std::int64_t group = call.heads / call.kv_heads, dim = call.head_dim;
    std::vector<Part> parts;
    std::vector<std::int64_t> first_part;  // of each (batch, token, key-value head)
    for (std::int64_t row = 0; row < call.batch * call.tokens; ++row) {
        const std::int64_t keys = call.mask == nullptr ? call.positions[row] + 1 : call.capacity;
        for (std::int64_t head = 0; head < call.kv_heads; ++head) {
            first_part.push_back(static_cast<std::int64_t>(parts.size()));
            for (std::int64_t chunk = 0; chunk < keys; chunk += kDecodeChunk) {
                parts.push_back({row / call.tokens, row % call.tokens, head, chunk, std::min(kDecodeChunk, keys - chunk), row});
            }
        }
    }
    first_part.push_back(static_cast<std::int64_t>(parts.size()));
    const auto count = static_cast<std::int64_t>(parts.size());
    const std::int64_t stride = group * (dim + 2);
    auto* partials = static_cast<float*>(thread_scratch(static_cast<std::size_t>(count * stride) * sizeof(float), 1));
    const auto kernel = decode_kernel(call.element);
    const auto scratch_floats = static_cast<std::size_t>(decode_scratch_floats(group, dim));
    for_each_part(count, threads, scratch_floats, [&](std::int64_t i, float* scratch) {
        const Part& part = parts[static_cast<std::size_t>(i)];
        kernel({at(call.q, call.element, part.batch, part.token, part.head * group),
                at(call.k, call.element, part.batch, part.chunk, part.head),
                at(call.v, call.element, part.batch, part.chunk, part.head),
                call.mask == nullptr ? nullptr : call.mask + part.place * call.capacity + part.chunk, call.q.head_stride,
                call.k.row_stride, call.v.row_stride, group, part.keys, dim, kLog2E / std::sqrt(static_cast<float>(dim)),
                partials + i * stride, scratch});
    });
    auto* sums = static_cast<float*>(thread_scratch(static_cast<std::size_t>(dim) * sizeof(float)));
    for (std::size_t place = 0; place + 1 < first_part.size(); ++place) {
        const std::int64_t first = first_part[place], chunks = first_part[place + 1] - first;
        for (std::int64_t head = 0; head < group; ++head) {
            const float* from = partials + first * stride + head * (dim + 2);
            const std::int64_t to = (static_cast<std::int64_t>(place) * group + head) * dim;
            if (call.element == Element::kBfloat16) {
                join_chunks(from, chunks, stride, dim, sums, static_cast<std::uint16_t*>(call.out) + to);
            } else {
                join_chunks(from, chunks, stride, dim, sums, static_cast<float*>(call.out) + to);
            }
        }
    }
}

// Many queries: the blocks of varlen_tile_attention with a limit on keys per query.
void prefill(const DecodeAttention& call, int threads) {
    const std::int64_t pieces = (call.tokens + kPrefillPart - 1) / kPrefillPart, group = call.heads / call.kv_heads;
    const std::int64_t count = call.batch * call.heads * pieces, size = call.element == Element::kBfloat16 ? 2 : 4;
    const auto kernel = attention_kernel(call.element);
    const auto scratch_floats = static_cast<std::size_t>(attention_scratch_floats(call.capacity, call.head_dim));
    for_each_part(count, threads, scratch_floats, [&](std::int64_t i, float* scratch) {
        // the last pieces see the most keys: they go first
        const std::int64_t piece = pieces - 1 - i / (call.batch * call.heads), rest = i % (call.batch * call.heads);
        const std::int64_t batch = rest / call.heads, head = rest % call.heads, first = piece * kPrefillPart;
        const std::int64_t queries = std::min(kPrefillPart, call.tokens - first);
        float limits[kPrefillPart];
        std::int64_t keys = 0;
        for (std::int64_t n = 0; n < queries; ++n) {
            const std::int64_t seen = call.positions[batch * call.tokens + first + n] + 1;
            limits[n] = static_cast<float>(seen);
            keys = std::max(keys, seen);
        }
        char* out = static_cast<char*>(call.out) + ((batch * call.tokens + first) * call.heads + head) * call.head_dim * size;
        kernel({at(call.q, call.element, batch, first, head), at(call.k, call.element, batch, 0, head / group),
                at(call.v, call.element, batch, 0, head / group), out, call.q.row_stride, call.k.row_stride, call.v.row_stride,
                call.heads * call.head_dim, queries, keys, call.head_dim, kLog2E / std::sqrt(static_cast<float>(call.head_dim)),
                scratch, limits});
    });
}

}  // namespace

void decode_attention(const DecodeAttention& call) {
    if (call.kv_heads < 1 || call.heads % call.kv_heads != 0 || call.capacity >= 1 << 24) {
        throw std::invalid_argument("query heads must be a multiple of key-value heads and the cache below 2^24 entries, got " +
                                    std::to_string(call.heads) + ", " + std::to_string(call.kv_heads) + " and " +
                                    std::to_string(call.capacity) + "; check the model's config");
    }
    double keys = 0;
    for (std::int64_t i = 0; i < call.batch * call.tokens; ++i) {
        if (call.positions[i] < 0 || call.positions[i] >= call.capacity) {
            throw std::invalid_argument("positions must be in 0.." + std::to_string(call.capacity - 1) +
                                        ", the entries of the cache, got " + std::to_string(call.positions[i]) +
                                        "; grow the cache first");
        }
        keys += static_cast<double>(call.mask == nullptr ? call.positions[i] + 1 : call.capacity);
    }
    const int threads = threads_for(keys * static_cast<double>(call.heads * call.head_dim), kParallelProducts);
    if (call.mask == nullptr && call.tokens >= kPrefillTokens) {
        prefill(call, threads);
    } else {
        decode(call, threads);
    }
}

}  // namespace rsvlm
