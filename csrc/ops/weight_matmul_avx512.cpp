#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#include "rsvlm/simd/avx512.h"

#include "weight_matmul_kernel.h"
#endif
