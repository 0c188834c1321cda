// The native twin of rsvlm_infer.ops.rms_norm. Knows no Python.
#pragma once

#include <cstdint>

#include "rsvlm/element.h"

namespace rsvlm {

// x [rows, width] and weight [width] of `element`, contiguous -> out of the same shape; statistics in fp32.
void rms_norm(const void* x, const void* weight, std::int64_t rows, std::int64_t width, float eps, Element element, void* out);

}  // namespace rsvlm
