#include "rsvlm/simd/portable.h"

#include "codes_kernel.h"
