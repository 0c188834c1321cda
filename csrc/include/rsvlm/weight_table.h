// The weights of a package by name, where they lie in memory. Owns no memory, knows no file and no model.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>

#include "rsvlm/linear.h"

namespace rsvlm {

class WeightTable {
  public:
    void add_linear(const std::string& name, const Linear& linear) { linears_[name] = linear; }
    void add_vector(const std::string& name, const float* values, std::int64_t count) { vectors_[name] = {values, count}; }

    void add_raw(const std::string& name, const void* values, std::int64_t count) { raw_[name] = {values, count}; }

    bool has_linear(const std::string& name) const { return linears_.count(name) != 0; }
    bool has_vector(const std::string& name) const { return vectors_.count(name) != 0; }

    // With its bias when the table has a vector "<name>.bias". Throw std::invalid_argument when it is absent or has another
    // shape.
    Linear linear(const std::string& name, std::int64_t rows, std::int64_t columns) const;
    const float* vector(const std::string& name, std::int64_t count) const;
    // Values of two bytes, for kernels that read a plain array. Null when there is none.
    const void* raw_or_null(const std::string& name, std::int64_t count) const;
    // Null when it is absent.
    const float* vector_or_null(const std::string& name, std::int64_t count) const;

  private:
    struct Vector {
        const float* values;
        std::int64_t count;
    };
    struct Raw {
        const void* values;
        std::int64_t count;
    };
    std::unordered_map<std::string, Linear> linears_;
    std::unordered_map<std::string, Vector> vectors_;
    std::unordered_map<std::string, Raw> raw_;
};

}  // namespace rsvlm
