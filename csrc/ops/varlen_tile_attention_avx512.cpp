#include "rsvlm/cpu.h"

#if RSVLM_X86_KERNELS
#include "rsvlm/simd/avx512.h"

#include "varlen_tile_attention_kernel.h"
#endif
