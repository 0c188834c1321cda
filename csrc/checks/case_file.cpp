#include "case_file.h"

#include <cmath>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "rsvlm/bfloat16.h"

namespace rsvlm::checks {
namespace {

std::size_t width_of(const std::string& type) {
    static const std::map<std::string, std::size_t> widths{
        {"bool", 1},     {"uint8", 1},   {"int8", 1},  {"uint16", 2},  {"int16", 2}, {"uint32", 4}, {"uint64", 8},
        {"bfloat16", 2}, {"float16", 2}, {"int32", 4}, {"float32", 4}, {"int64", 8}, {"float64", 8}};
    const auto found = widths.find(type);
    if (found == widths.end()) {
        throw std::runtime_error("the case file has an array of unknown type '" + type + "'");
    }
    return found->second;
}

Array read_array(std::istream& file, const std::string& type, std::size_t count) {
    Array array(type, count);
    file.get();  // the line break before the bytes
    file.read(array.as<char>(), static_cast<std::streamsize>(array.bytes()));
    if (!file) {
        throw std::runtime_error("the case file ends inside an array");
    }
    return array;
}

template <typename Map>
const typename Map::mapped_type& named(const Map& map, const std::string& name, const Case& recorded) {
    const auto found = map.find(name);
    if (found == map.end()) {
        throw std::runtime_error(recorded.op + " " + recorded.label + " was recorded without " + name);
    }
    return found->second;
}

}  // namespace

Array::Array(std::string type, std::size_t count)
    : type_(std::move(type)), count_(count), width_(width_of(type_)), memory_(new std::byte[(count + 1) * width_]) {}

Element Array::element() const {
    if (type_ != "float32" && type_ != "bfloat16") {
        throw std::runtime_error("no kernel reads " + type_);
    }
    return type_ == "float32" ? Element::kFloat32 : Element::kBfloat16;
}

double Array::at(std::size_t index) const {
    if (type_ == "float32") {
        return as<float>()[index];
    }
    if (type_ == "float64") {
        return as<double>()[index];
    }
    if (type_ == "bfloat16") {
        return widen(as<std::uint16_t>()[index]);
    }
    if (type_ == "int32") {
        return as<std::int32_t>()[index];
    }
    if (type_ == "int64") {
        return static_cast<double>(as<std::int64_t>()[index]);
    }
    if (type_ == "uint8" || type_ == "bool") {
        return as<std::uint8_t>()[index];
    }
    if (type_ == "int8") {
        return as<std::int8_t>()[index];
    }
    if (type_ == "uint16") {
        return as<std::uint16_t>()[index];
    }
    if (type_ == "int16") {
        return as<std::int16_t>()[index];
    }
    if (type_ == "uint32") {
        return as<std::uint32_t>()[index];
    }
    if (type_ == "uint64") {
        return static_cast<double>(as<std::uint64_t>()[index]);
    }
    throw std::runtime_error("no output is " + type_);
}

std::int64_t Case::number(const std::string& name) const { return static_cast<std::int64_t>(named(numbers, name, *this)); }

const Array& Case::array(const std::string& name) const { return named(arrays, name, *this); }

const void* Case::data_or_null(const std::string& name) const { return arrays.count(name) == 0 ? nullptr : array(name).data(); }

std::vector<std::int64_t> Case::integers(const std::string& name) const {
    const Array& list = array(name);
    return {list.as<std::int64_t>(), list.as<std::int64_t>() + list.count()};
}

std::optional<Case> read_case(std::istream& file) {
    std::string word, name, type;
    if (!(file >> word)) {
        return std::nullopt;
    }
    Case recorded;
    while (file && word != "end") {
        std::size_t count = 0;
        if (word == "case") {
            file >> recorded.op >> recorded.label;
        } else if (word == "number") {
            file >> name;
            file >> recorded.numbers[name];
        } else if (word == "word") {
            file >> name;
            file >> recorded.words[name];
        } else if (word == "refusal") {
            std::getline(file >> std::ws, recorded.refusal);
        } else if (word == "array") {
            file >> name >> type >> count;
            recorded.arrays[name] = read_array(file, type, count);
        } else if (word == "expect") {
            Expected& expected = recorded.expected[(file >> name, name)];
            file >> expected.type >> count >> expected.allowed;
            expected.values = read_array(file, "float64", count);
        } else {
            throw std::runtime_error("the case file has an unknown line '" + word + "'");
        }
        file >> word;
    }
    if (!file || recorded.expected.empty()) {
        throw std::runtime_error("the case file is cut short after " + recorded.op + " " + recorded.label);
    }
    return recorded;
}

Outputs blank_outputs(const Case& recorded) {
    Outputs outputs;
    for (const auto& [name, expected] : recorded.expected) {
        Array& output = outputs[name] = Array(expected.type, expected.values.count());
        std::memset(output.data(), 0x47, output.bytes());  // 51015.2 as float32 and bfloat16, 1195853639 as int32
    }
    return outputs;
}

std::string difference(const Case& recorded, const Outputs& outputs) {
    for (const auto& [name, expected] : recorded.expected) {
        const Array& output = outputs.at(name);
        for (std::size_t i = 0; i < expected.values.count(); ++i) {
            const double want = expected.values.at(i), got = output.at(i);
            const bool same = want == got || (std::isnan(want) && std::isnan(got));
            if (!same && !(std::abs(got - want) <= expected.allowed)) {
                std::ostringstream message;
                message.precision(9);
                message << name << "[" << i << "] is " << got << ", expected " << want << " within " << expected.allowed;
                return message.str();
            }
        }
    }
    return "";
}

bool same_bits(const Outputs& one, const Outputs& other) {
    for (const auto& [name, output] : one) {
        if (std::memcmp(output.data(), other.at(name).data(), output.bytes()) != 0) {
            return false;
        }
    }
    return true;
}

}  // namespace rsvlm::checks
