#include <cstring>
#include <stdexcept>
#include <string>

#include "rsvlm/decoder.h"

namespace rsvlm {
namespace {

std::int64_t place_bytes(const DecoderShape& shape) { return shape.head_dim * (shape.cache == Element::kBfloat16 ? 2 : 4); }

}  // namespace

KvCache::KvCache(const DecoderShape& shape, std::int64_t rows, std::int64_t capacity)
    : layers_(shape.layers),
      rows_(rows),
      kv_heads_(shape.kv_heads),
      capacity_(capacity),
      place_bytes_(place_bytes(shape)),
      element_(shape.cache) {
    if (rows < 1 || capacity < 1 || capacity >= 1 << 24) {
        throw std::invalid_argument("a cache must have at least one row and 1 to 2^24 - 1 places a row, got " +
                                    std::to_string(rows) + " and " + std::to_string(capacity) + "; ask for what is needed");
    }
    const auto bytes = static_cast<std::size_t>(offset(layers_, 0, 0, 0));
    keys_.reset(new char[bytes]);  // not cleared: nothing is read before it is written, and untouched pages cost nothing
    values_.reset(new char[bytes]);
}

bool KvCache::fits(const DecoderShape& shape) const {
    return layers_ == shape.layers && kv_heads_ == shape.kv_heads && element_ == shape.cache &&
           place_bytes_ == place_bytes(shape);
}

void KvCache::copy_row(const KvCache& from, std::int64_t from_row, std::int64_t to_row, std::int64_t length) {
    if (from.layers_ != layers_ || from.kv_heads_ != kv_heads_ || from.place_bytes_ != place_bytes_ || from_row < 0 ||
        from_row >= from.rows_ || to_row < 0 || to_row >= rows_ || length < 0 || length > std::min(capacity_, from.capacity_)) {
        throw std::invalid_argument("rows must be copied between caches of one model, within " + std::to_string(rows_) +
                                    " rows of " + std::to_string(capacity_) + " places, got row " + std::to_string(to_row) +
                                    " and " + std::to_string(length) + " places; make the cache larger");
    }
    const auto bytes = static_cast<std::size_t>(length * place_bytes_);
    for (std::int64_t layer = 0; layer < layers_; ++layer) {
        for (std::int64_t head = 0; head < kv_heads_; ++head) {
            std::memcpy(key(layer, to_row, head, 0), from.key(layer, from_row, head, 0), bytes);
            std::memcpy(value(layer, to_row, head, 0), from.value(layer, from_row, head, 0), bytes);
        }
    }
}

}  // namespace rsvlm
