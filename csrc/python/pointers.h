// Torch tensors cross as addresses: bfloat16 has no numpy view, and an address costs a tenth of a dlpack capsule.
// The Python twin has checked device, dtype, shape and strides.
#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "rsvlm/element.h"

namespace rsvlm::python {

using Address = std::uintptr_t;
using Strides = std::array<std::int64_t, 2>;

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline Element element(const std::string& dtype) {
    if (dtype == "float32") {
        return Element::kFloat32;
    }
    if (dtype == "bfloat16") {
        return Element::kBfloat16;
    }
    throw std::invalid_argument("dtype must be 'float32' or 'bfloat16', got '" + dtype + "'; convert the tensors");
}

}  // namespace rsvlm::python
