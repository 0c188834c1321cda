#include "rsvlm/simd/portable.h"

#include "cue_search_kernel.h"
