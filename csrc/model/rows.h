// The row kernels of the machine's instruction set. Knows no op.
#pragma once

#include "rows_kernel.h"
#include "rsvlm/cpu.h"

namespace rsvlm {

struct RowKernels {
    void (*norm)(const NormPart&);
    void (*convert)(const float*, std::int64_t, Element, void*);
    void (*gate)(const float*, const float*, std::int64_t, Element, void*);
    void (*activate)(const float*, std::int64_t, Activation, Element, void*);
    void (*rotate)(const float*, const float*, const float*, std::int64_t, Element, void*);
    void (*add)(const float*, std::int64_t, float, float*);  // to += factor * x
    void (*convert_block)(const BlockPart&);
    void (*gate_block)(const float*, std::int64_t, float*);
    void (*widen)(const std::uint16_t*, std::int64_t, float*);
};

inline RowKernels row_kernels() {
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            return {avx512_bf16::norm_row,      avx512_bf16::convert_row, avx512_bf16::gate_row,
                    avx512_bf16::activate_row,  avx512_bf16::rotate_row,  avx512_bf16::add_row,
                    avx512_bf16::convert_block, avx512_bf16::gate_block,  avx512_bf16::widen_row};
        case Isa::kAvx512:
            return {avx512::norm_row, avx512::convert_row,   avx512::gate_row,   avx512::activate_row, avx512::rotate_row,
                    avx512::add_row,  avx512::convert_block, avx512::gate_block, avx512::widen_row};
        case Isa::kAvx2:
            return {avx2::norm_row, avx2::convert_row,   avx2::gate_row,   avx2::activate_row, avx2::rotate_row,
                    avx2::add_row,  avx2::convert_block, avx2::gate_block, avx2::widen_row};
#endif
        default:
            return {portable::norm_row,      portable::convert_row, portable::gate_row,
                    portable::activate_row,  portable::rotate_row,  portable::add_row,
                    portable::convert_block, portable::gate_block,  portable::widen_row};
    }
}

}  // namespace rsvlm
