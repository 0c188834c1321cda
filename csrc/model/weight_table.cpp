#include "rsvlm/weight_table.h"

#include <stdexcept>

namespace rsvlm {
namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& expected, const std::string& found) {
    throw std::invalid_argument("weight " + name + " must be " + expected + ", got " + found + "; export the package again");
}

std::string shown(std::int64_t rows, std::int64_t columns) {
    return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

}  // namespace

Linear WeightTable::linear(const std::string& name, std::int64_t rows, std::int64_t columns) const {
    const auto found = linears_.find(name);
    if (found == linears_.end()) {
        refuse(name, shown(rows, columns), "nothing");
    }
    Linear linear = found->second;
    if (linear.rows != rows || linear.columns != columns) {
        refuse(name, shown(rows, columns), shown(linear.rows, linear.columns));
    }
    linear.bias = vector_or_null(name + ".bias", rows);
    return linear;
}

const float* WeightTable::vector(const std::string& name, std::int64_t count) const {
    const float* values = vector_or_null(name, count);
    if (values == nullptr) {
        refuse(name, "[" + std::to_string(count) + "]", "nothing");
    }
    return values;
}

const float* WeightTable::vector_or_null(const std::string& name, std::int64_t count) const {
    const auto found = vectors_.find(name);
    if (found == vectors_.end()) {
        return nullptr;
    }
    if (found->second.count != count) {
        refuse(name, "[" + std::to_string(count) + "]", "[" + std::to_string(found->second.count) + "]");
    }
    return found->second.values;
}

const void* WeightTable::raw_or_null(const std::string& name, std::int64_t count) const {
    const auto found = raw_.find(name);
    if (found == raw_.end()) {
        return nullptr;
    }
    if (found->second.count != count) {
        refuse(name, "[" + std::to_string(count) + "]", "[" + std::to_string(found->second.count) + "]");
    }
    return found->second.values;
}

}  // namespace rsvlm
