#include "rsvlm/simd/portable.h"

#include "weight_matmul_kernel.h"
