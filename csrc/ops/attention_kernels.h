// The attention kernels of the machine's instruction set. Knows no op.
#pragma once

#include "decode_attention_kernel.h"
#include "rsvlm/cpu.h"
#include "rsvlm/element.h"
#include "varlen_tile_attention_kernel.h"

namespace rsvlm {

// Many queries at once, in tiles or in prompts.
inline auto attention_kernel(Element element) -> void (*)(const AttentionPart&) {
    const bool bf16 = element == Element::kBfloat16;
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            return bf16 ? avx512_bf16::attention_part_bf16 : avx512::attention_part_fp32;
        case Isa::kAvx512:
            return bf16 ? avx512::attention_part_bf16 : avx512::attention_part_fp32;
        case Isa::kAvx2:
            return bf16 ? avx2::attention_part_bf16 : avx2::attention_part_fp32;
#endif
        default:
            return bf16 ? portable::attention_part_bf16 : portable::attention_part_fp32;
    }
}

// One query over a chunk of a cache.
inline auto decode_kernel(Element element) -> void (*)(const DecodePart&) {
    const bool bf16 = element == Element::kBfloat16;
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
        case Isa::kAvx512:
            return bf16 ? avx512::decode_part_bf16 : avx512::decode_part_fp32;
        case Isa::kAvx2:
            return bf16 ? avx2::decode_part_bf16 : avx2::decode_part_fp32;
#endif
        default:
            return bf16 ? portable::decode_part_bf16 : portable::decode_part_fp32;
    }
}

}  // namespace rsvlm
