#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#include "rsvlm/simd/avx512.h"

#include "linear_kernel.h"
#endif
