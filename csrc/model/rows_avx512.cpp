#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#include "rsvlm/simd/avx512.h"

#include "rows_kernel.h"
#endif
