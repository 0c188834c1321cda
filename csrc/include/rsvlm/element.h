// Element types that kernels read and write. Knows no op.
#pragma once

namespace rsvlm {

enum class Element { kFloat32, kBfloat16 };

}  // namespace rsvlm
