#include "rsvlm/weight_matmul.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"
#include "rsvlm/scratch.h"
#include "weight_matmul_kernel.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kTokensAtOnce = 8;
constexpr double kParallelBytes = 128 << 10;  // some 5 microseconds of reading

std::int64_t groups_of(const WeightShape& shape) { return (shape.columns + kWeightGroup - 1) / kWeightGroup; }
std::int64_t blocks_of(const WeightShape& shape) { return (shape.rows + kWeightRows - 1) / kWeightRows; }

using Kernel = void (*)(const WeightPart&);

Kernel choose_kernel(bool paired) {
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            return paired ? avx512_bf16::weight_matmul_part : avx512::weight_matmul_part;
        case Isa::kAvx512:
            return avx512::weight_matmul_part;
        case Isa::kAvx2:
            return avx2::weight_matmul_part;
#endif
        default:
            (void)paired;
            return portable::weight_matmul_part;
    }
}

}  // namespace

std::int64_t weight_layout_bytes(const WeightShape& shape) {
    if (shape.rows < 1 || shape.columns < 1 || (shape.kind != WeightKind::kBf16 && shape.columns % kWeightGroup != 0)) {
        throw std::invalid_argument(
            "weight must have at least one row and one column, for int8 and int4 a multiple of 32, got " +
            std::to_string(shape.rows) + " by " + std::to_string(shape.columns) + "; use bf16");
    }
    return blocks_of(shape) * groups_of(shape) * weight_group_bytes(shape);
}

void lay_out_weight(const WeightShape& shape, const void* codes, const void* scales, void* layout) {
    std::memset(layout, 0, static_cast<std::size_t>(weight_layout_bytes(shape)));  // rows and columns that pad a block
    const std::int64_t groups = groups_of(shape), scale_size = shape.wide_scales ? 4 : 2;
    const auto* bytes = static_cast<const unsigned char*>(codes);
    for (std::int64_t row = 0; row < shape.rows; ++row) {
        const std::int64_t lane = row % kWeightRows;
        char* group = static_cast<char*>(layout) + row / kWeightRows * groups * weight_group_bytes(shape);
        for (std::int64_t g = 0; g < groups; ++g, group += weight_group_bytes(shape)) {
            if (shape.kind != WeightKind::kBf16) {
                std::memcpy(group + lane * scale_size, static_cast<const char*>(scales) + (row * groups + g) * scale_size,
                            static_cast<std::size_t>(scale_size));
            }
            char* target = group + weight_scale_bytes(shape);
            const std::int64_t first = g * kWeightGroup, stop = std::min(first + kWeightGroup, shape.columns);
            if (shape.kind == WeightKind::kInt4) {
                for (std::int64_t octet = 0; octet < 4; ++octet) {  // 8 codes are 4 bytes, low half-byte first, in both layouts
                    std::memcpy(target + (octet * kWeightRows + lane) * 4,
                                bytes + (row * shape.columns + first) / 2 + octet * 4, 4);
                }
            } else {
                const std::int64_t size = shape.kind == WeightKind::kInt8 ? 1 : 2;
                for (std::int64_t column = first; column < stop; ++column) {
                    std::memcpy(target + ((column - first) * kWeightRows + lane) * size,
                                bytes + (row * shape.columns + column) * size, static_cast<std::size_t>(size));
                }
            }
        }
    }
}

void weight_matmul(const WeightShape& shape, const void* layout, const void* x, std::int64_t tokens, Element element,
                   void* out) {
    const std::int64_t bytes = weight_layout_bytes(shape), groups = groups_of(shape), blocks = blocks_of(shape);
    const std::int64_t padded = groups * kWeightGroup, size = element == Element::kBfloat16 ? 2 : 4;
    // int4 with bf16 activations: the dot product of pairs is exact and takes half the instructions
    const bool paired = kernel_isa() == Isa::kAvx512Bf16 && shape.kind == WeightKind::kInt4 && element == Element::kBfloat16;
    const Kernel kernel = choose_kernel(paired);
    const auto threads =
        static_cast<int>(std::min<std::int64_t>(threads_for(static_cast<double>(bytes), kParallelBytes), blocks));
    for (std::int64_t token = 0; token < tokens; token += kTokensAtOnce) {
        const std::int64_t count = std::min(kTokensAtOnce, tokens - token);
        const char* source = static_cast<const char*>(x) + token * shape.columns * size;
        const auto* rows = reinterpret_cast<const float*>(source);
        if (paired) {
            const auto* halves = reinterpret_cast<const std::uint16_t*>(source);
            auto* words = static_cast<std::uint32_t*>(thread_scratch(static_cast<std::size_t>(count * padded) * 2));
            for (std::int64_t octet = 0; octet < count * padded / 8; ++octet) {
                for (std::int64_t j = 0; j < 4; ++j) {
                    const std::uint16_t* low = halves + octet * 8 + j;
                    words[octet * 4 + j] = low[0] | static_cast<std::uint32_t>(low[4]) << 16;
                }
            }
            rows = reinterpret_cast<const float*>(words);
        } else if (element == Element::kBfloat16 || padded != shape.columns) {
            auto* copy = static_cast<float*>(thread_scratch(static_cast<std::size_t>(count * padded) * sizeof(float)));
            for (std::int64_t t = 0; t < count; ++t) {
                for (std::int64_t i = 0; i < padded; ++i) {
                    const std::int64_t at = t * shape.columns + i;
                    copy[t * padded + i] = i >= shape.columns ? 0.0f
                                           : element == Element::kFloat32
                                               ? rows[at]
                                               : widen(reinterpret_cast<const std::uint16_t*>(source)[at]);
                }
            }
            rows = copy;
        }
        char* target = static_cast<char*>(out) + token * shape.rows * size;
        for_each_part(threads, threads, 0, [&](std::int64_t part, float*) {
            const std::int64_t first = blocks * part / threads, stop = blocks * (part + 1) / threads;
            kernel({shape, static_cast<const char*>(layout) + first * groups * weight_group_bytes(shape), rows, count, groups,
                    first * kWeightRows, std::min(stop * kWeightRows, shape.rows), target, element});
        });
    }
}

}  // namespace rsvlm
