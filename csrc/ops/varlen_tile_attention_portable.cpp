#include "rsvlm/simd/portable.h"

#include "varlen_tile_attention_kernel.h"
