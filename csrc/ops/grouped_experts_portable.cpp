#include "rsvlm/simd/portable.h"

#include "grouped_experts_kernel.h"
