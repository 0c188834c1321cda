#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#include "rsvlm/simd/avx2.h"

#include "codes_kernel.h"
#endif
