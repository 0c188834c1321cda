#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#define RSVLM_DOT_BF16
#include "rsvlm/simd/avx512.h"

#include "rows_kernel.h"
#endif
