// Recorded cases of native ops: inputs, what the eager definition gives for them, how far a twin may be off. Knows no op.
#pragma once

#include <cstddef>
#include <cstdint>
#include <istream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "rsvlm/element.h"

namespace rsvlm::checks {

// A contiguous array. It ends where its memory ends, so that a sanitizer sees the first byte read or written beyond, and starts
// one element off the allocator's boundary, because a view of a tensor has no better alignment than its elements.
class Array {
  public:
    Array() = default;
    Array(std::string type, std::size_t count);

    const std::string& type() const { return type_; }
    std::size_t count() const { return count_; }
    std::size_t bytes() const { return count_ * width_; }
    void* data() const { return memory_.get() + width_; }
    template <typename T>
    T* as() const {
        return static_cast<T*>(data());
    }
    Element element() const;
    double at(std::size_t index) const;  // any type, exact

  private:
    std::string type_;
    std::size_t count_ = 0, width_ = 0;
    std::shared_ptr<std::byte[]> memory_;
};

struct Expected {
    Array values;    // float64
    double allowed;  // largest absolute difference
    std::string type;
};

struct Case {
    std::string op, label, refusal;  // `refusal`: a part of the message of the std::invalid_argument that must come instead
    std::map<std::string, double> numbers;
    std::map<std::string, std::string> words;
    std::map<std::string, Array> arrays;
    std::map<std::string, Expected> expected;

    std::int64_t number(const std::string& name) const;
    const Array& array(const std::string& name) const;
    const void* data_or_null(const std::string& name) const;
    std::vector<std::int64_t> integers(const std::string& name) const;
};

using Outputs = std::map<std::string, Array>;

// The next case; nothing at the end of the file. Throws std::runtime_error when the file is cut short or malformed.
std::optional<Case> read_case(std::istream& file);

// One array per expected output, filled with a pattern that is no right answer.
Outputs blank_outputs(const Case& recorded);

// What is wrong with `outputs`; empty when nothing is. NaN equals NaN, infinity equals infinity.
std::string difference(const Case& recorded, const Outputs& outputs);

bool same_bits(const Outputs& one, const Outputs& other);

}  // namespace rsvlm::checks
