// bfloat16 in plain integer arithmetic, which compilers vectorise. Knows no op.
#pragma once

#include <cstdint>
#include <cstring>

namespace rsvlm {

inline float widen(float value) { return value; }
inline float widen(std::uint16_t bf16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// To nearest, ties to even; NaN stays NaN.
inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, std::uint16_t* to) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *to = static_cast<std::uint16_t>(value != value ? 0x7fc0 : rounded);
}

}  // namespace rsvlm
