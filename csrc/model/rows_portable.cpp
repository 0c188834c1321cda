#include "rsvlm/simd/portable.h"

#include "rows_kernel.h"
