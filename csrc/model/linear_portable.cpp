#include "rsvlm/simd/portable.h"

#include "linear_kernel.h"
