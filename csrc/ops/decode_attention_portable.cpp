#include "rsvlm/simd/portable.h"

#include "decode_attention_kernel.h"
