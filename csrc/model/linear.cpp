#include "rsvlm/linear.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../ops/weight_matmul_kernel.h"
#include "codes_kernel.h"
#include "linear_kernel.h"
#include "rows.h"
#include "rsvlm/bfloat16.h"
#include "rsvlm/cpu.h"
#include "rsvlm/parallel.h"

namespace rsvlm {
namespace {

constexpr std::int64_t kRowsAtOnce = 240;   // against so many rows the unpacking of a block is one percent
constexpr std::int64_t kTileMultiple = 60;  // whole register tiles of 12, 6, 5, 4 or 3 rows
constexpr std::int64_t kRowsInCache = 60;   // their sums with a block are 8 KB, beside 14 KB of its panel at ViT-S width
constexpr int kMostBlocks = 2;

WeightShape shape_of(const Linear& linear) {
    const WeightKind kind = linear.kind == LinearKind::kInt8   ? WeightKind::kInt8
                            : linear.kind == LinearKind::kInt4 ? WeightKind::kInt4
                                                               : WeightKind::kBf16;
    return {kind, linear.rows, linear.columns, false};
}

struct LinearKernels {
    void (*unpack)(const PanelPart&);
    void (*multiply)(const TilePart&);
    void (*floats)(const FewPart&);
    void (*few)(const WeightPart&);
};

LinearKernels choose_kernels(LinearKind kind) {
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            if (kind != LinearKind::kFloat32) {
                return {avx512_bf16::unpack_panel, avx512_bf16::multiply_panel, nullptr,
                        kind == LinearKind::kInt4 ? avx512_bf16::weight_matmul_part : avx512::weight_matmul_part};
            }
            [[fallthrough]];
        case Isa::kAvx512:
            return {avx512::unpack_panel, avx512::multiply_panel, avx512::multiply_floats, avx512::weight_matmul_part};
        case Isa::kAvx2:
            return {avx2::unpack_panel, avx2::multiply_panel, avx2::multiply_floats, avx2::weight_matmul_part};
#endif
        default:
            (void)kind;
            return {portable::unpack_panel, portable::multiply_panel, portable::multiply_floats, portable::weight_matmul_part};
    }
}

struct CodesKernels {
    void (*round)(LinearKind, const float*, std::int64_t, RowGroup*, std::int64_t);
    void (*unpack)(const PanelPart&);
    void (*multiply)(const TilePart&);
    void (*few)(const FewCodesPart&);
};

CodesKernels codes_kernels() {
    switch (kernel_isa()) {
#if RSVLM_X86_KERNELS
        case Isa::kAvx512Bf16:
            return {avx512_bf16::round_groups, avx512_bf16::unpack_codes, avx512_bf16::multiply_codes,
                    avx512_bf16::multiply_few_codes};
        case Isa::kAvx512:
            return {avx512::round_groups, avx512::unpack_codes, avx512::multiply_codes, avx512::multiply_few_codes};
        case Isa::kAvx2:
            return {avx2::round_groups, avx2::unpack_codes, avx2::multiply_codes, avx2::multiply_few_codes};
#endif
        default:
            return {portable::round_groups, portable::unpack_codes, portable::multiply_codes, portable::multiply_few_codes};
    }
}

bool takes_pairs(const Linear& linear) { return kernel_isa() == Isa::kAvx512Bf16 && linear.kind == LinearKind::kInt4; }

// float16 to float32, exact.
float widen_half(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
    std::uint32_t bits = magnitude << 13;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    value *= 0x1p+112f;
    std::memcpy(&bits, &value, sizeof(bits));
    bits = (magnitude >= 0x7c00 ? (magnitude << 13) | 0x7f800000 : bits) | sign;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

}  // namespace

std::int64_t linear_block_bytes(const Linear& linear) {
    const std::int64_t groups = padded_columns(linear.columns) / kWeightGroup;
    return linear.kind == LinearKind::kFloat32 ? groups * kWeightGroup * kWeightRows * 4
                                               : groups * weight_group_bytes(shape_of(linear));
}

std::int64_t linear_layout_bytes(const Linear& linear) {
    weight_layout_bytes(shape_of(linear));  // refuses impossible shapes
    return linear_blocks(linear) * linear_block_bytes(linear);
}

void read_linear_row(const Linear& linear, std::int64_t row, float* to) {
    const std::int64_t lane = row % kWeightRows;
    const char* block = linear.layout + row / kWeightRows * linear_block_bytes(linear);
    if (linear.kind == LinearKind::kFloat32) {
        for (std::int64_t column = 0; column < linear.columns; ++column) {
            to[column] = reinterpret_cast<const float*>(block)[column * kWeightRows + lane];
        }
        return;
    }
    const WeightShape shape = shape_of(linear);
    for (std::int64_t column = 0; column < linear.columns; ++column) {
        const char* group = block + column / kWeightGroup * weight_group_bytes(shape);
        const char* codes = group + weight_scale_bytes(shape);
        const std::int64_t at = column % kWeightGroup;
        if (linear.kind == LinearKind::kBf16) {
            to[column] = widen(reinterpret_cast<const std::uint16_t*>(codes)[at * kWeightRows + lane]);
            continue;
        }
        const float scale = widen_half(reinterpret_cast<const std::uint16_t*>(group)[lane]);
        int code = 0;
        if (linear.kind == LinearKind::kInt8) {
            code = reinterpret_cast<const std::int8_t*>(codes)[at * kWeightRows + lane];
        } else {
            const std::uint32_t word = reinterpret_cast<const std::uint32_t*>(codes)[at / 8 * kWeightRows + lane];
            code = static_cast<int>(word >> (at % 8 * 4) & 15) - 8;
        }
        to[column] = static_cast<float>(code) * scale;
    }
}

std::int64_t few_scratch_floats(std::int64_t columns, std::int64_t tokens) { return padded_columns(columns) / 2 * tokens + 16; }

void multiply_few(const Linear& linear, const float* x, std::int64_t tokens, std::int64_t first, std::int64_t stop, float* out,
                  float* scratch) {
    const LinearKernels kernels = choose_kernels(linear.kind);
    const std::int64_t padded = padded_columns(linear.columns), first_row = first * kWeightRows;
    const std::int64_t stop_row = std::min(stop * kWeightRows, linear.rows);
    if (first_row >= stop_row) {
        return;
    }
    const char* layout = linear.layout + first * linear_block_bytes(linear);
    if (linear.int8_inputs) {
        const CodesKernels codes = codes_kernels();
        auto* rows = reinterpret_cast<RowGroup*>(scratch);
        codes.round(linear.kind, x, tokens * padded / kPanelGroup, rows, 1);
        codes.few({linear.kind, layout, rows, tokens, padded / kPanelGroup, first_row, stop_row, linear.rows, out});
    } else if (linear.kind == LinearKind::kFloat32) {
        kernels.floats({x, reinterpret_cast<const float*>(layout), padded, tokens, stop - first, out + first_row, linear.rows,
                        stop_row - first_row});
    } else {
        if (takes_pairs(linear)) {
#if RSVLM_X86_KERNELS
            avx512_bf16::pair_octets(x, tokens * padded, reinterpret_cast<std::uint32_t*>(scratch));
#endif
            x = scratch;
        }
        kernels.few({shape_of(linear), layout, x, tokens, padded / kWeightGroup, first_row, stop_row, out, Element::kFloat32});
    }
    if (linear.bias != nullptr) {
        for (std::int64_t token = 0; token < tokens; ++token) {
            for (std::int64_t row = first_row; row < stop_row; ++row) {
                out[token * linear.rows + row] += linear.bias[row];
            }
        }
    }
}

Operand operand_of(const Linear& linear) {
    if (linear.int8_inputs) {
        return linear.kind == LinearKind::kInt4 ? Operand::kInt8ForInt4 : Operand::kInt8;
    }
    return kernel_isa() == Isa::kAvx512Bf16 && linear.kind != LinearKind::kFloat32 ? Operand::kBf16 : Operand::kFloat32;
}

std::int64_t operand_row_bytes(Operand operand, std::int64_t columns) {
    const std::int64_t padded = padded_columns(columns);
    return operand == Operand::kFloat32 ? padded * 4
           : operand == Operand::kBf16  ? padded * 2
                                        : padded / kPanelGroup * static_cast<std::int64_t>(sizeof(RowGroup));
}

void write_operand_row(Operand operand, const float* x, std::int64_t columns, void* to) {
    if (operand == Operand::kInt8 || operand == Operand::kInt8ForInt4) {
        const LinearKind kind = operand == Operand::kInt8 ? LinearKind::kInt8 : LinearKind::kInt4;
        codes_kernels().round(kind, x, columns / kPanelGroup, static_cast<RowGroup*>(to), 1);
        return;
    }
    const std::int64_t bytes = operand == Operand::kBf16 ? 2 : 4;
    row_kernels().convert(x, columns, operand == Operand::kBf16 ? Element::kBfloat16 : Element::kFloat32, to);
    std::memset(static_cast<char*>(to) + columns * bytes, 0,
                static_cast<std::size_t>((padded_columns(columns) - columns) * bytes));
}

void write_operand_columns(Operand operand, const float* x, std::int64_t rows, std::int64_t column, std::int64_t columns,
                           void* to) {
    const std::int64_t padded = padded_columns(columns);
    if (operand == Operand::kInt8 || operand == Operand::kInt8ForInt4) {
        const LinearKind kind = operand == Operand::kInt8 ? LinearKind::kInt8 : LinearKind::kInt4;
        codes_kernels().round(kind, x, rows, static_cast<RowGroup*>(to) + column / kPanelGroup, padded / kPanelGroup);
        return;
    }
    const Element element = operand == Operand::kBf16 ? Element::kBfloat16 : Element::kFloat32;
    char* first = static_cast<char*>(to) + column * (operand == Operand::kBf16 ? 2 : 4);
    row_kernels().convert_block({x, rows, kPanelGroup, kPanelGroup, element, first, padded});
}

namespace {

// What multiply_many and pass_products share. receive(block, first token, tokens, tile without its outputs) is called for each
// block with its panel, `tokens` at a time.
struct Multiplication {
    const Linear& linear;
    const ManyRows& call;
    LinearKernels kernels = choose_kernels(linear.kind);
    CodesKernels codes = codes_kernels();
    std::int64_t padded = padded_columns(linear.columns);
    std::int64_t row_bytes = operand_row_bytes(call.operand, linear.columns);
    std::int64_t count = linear.int8_inputs ? padded / kPanelGroup : call.operand == Operand::kBf16 ? padded / 2 : padded;
    std::int64_t block_bytes = linear_block_bytes(linear);
    bool plain = linear.kind == LinearKind::kFloat32;  // lies as a panel already

    std::size_t panel_floats() const { return static_cast<std::size_t>(plain ? 0 : padded * kWeightRows); }

    const float* panel(std::int64_t block, float* scratch) const {
        const char* layout = linear.layout + block * block_bytes;
        if (plain) {
            return reinterpret_cast<const float*>(layout);
        }
        (linear.int8_inputs ? codes.unpack : kernels.unpack)({linear.kind, layout, padded / kWeightGroup, scratch});
        return scratch;
    }

    // Rows `token`.. of x times a block's panel. The same `share` of the block `next` is fetched meanwhile.
    void multiply(std::int64_t block, const float* panel, std::int64_t token, std::int64_t tokens, const ProductsTo& to,
                  std::int64_t next, const Share& share) const {
        const std::int64_t row = block * kWeightRows;
        const bool fetches = !plain && next < linear_blocks(linear);
        const TilePart tile{static_cast<const char*>(call.x) + token * row_bytes,
                            tokens,
                            count,
                            panel,
                            to.out,
                            to.out_stride,
                            std::min(kWeightRows, linear.rows - row),
                            linear.bias == nullptr ? nullptr : linear.bias + row,
                            to.scale == nullptr ? nullptr : to.scale + row,
                            to.add,
                            linear.layout + (fetches ? next * block_bytes + share.first : 0),
                            fetches ? share.stop - share.first : 0};
        (linear.int8_inputs ? codes.multiply : kernels.multiply)(tile);
    }
};

// Rows in pieces of one length, so that none pays the unpacking for a few.
struct Pieces {
    std::int64_t tokens, count, step;

    explicit Pieces(std::int64_t all)
        : tokens(all),
          count(std::max<std::int64_t>(1, (all + kRowsAtOnce / 2) / kRowsAtOnce)),
          step(((all + count - 1) / count + kTileMultiple - 1) / kTileMultiple * kTileMultiple) {
        count = (all + step - 1) / step;
    }
    std::int64_t first(std::int64_t piece) const { return piece * step; }
    std::int64_t length(std::int64_t piece) const { return std::min(step, tokens - piece * step); }
};

// Parts that threads take one after another lie far from each other, so that no two write to one cache line at a time.
std::int64_t spread(std::int64_t part, std::int64_t parts, std::int64_t threads) {
    const std::int64_t whole = parts / threads * threads;  // what is left after them comes last
    return part < whole ? part % threads * (parts / threads) + part / threads : part;
}

}  // namespace

void multiply_many(const Linear& linear, const ManyRows& call, const ProductsTo& to) {
    const Multiplication work{linear, call};
    const Pieces pieces(call.tokens);
    const std::int64_t parts = linear_blocks(linear) * pieces.count;
    for_each_part(parts, call.threads, work.panel_floats(), [&](std::int64_t index, float* scratch) {
        const std::int64_t part = spread(index, parts, call.threads), piece = part % pieces.count;
        const std::int64_t block = part / pieces.count, token = pieces.first(piece);
        work.multiply(block, work.panel(block, scratch), token, pieces.length(piece),
                      {to.out + token * to.out_stride + block * kWeightRows, to.out_stride, to.add, to.scale}, block + 1,
                      {0, work.block_bytes});
    });
}

void pass_products(const Linear& linear, const ManyRows& call, int blocks, ProductsFunction function, const void* body) {
    const Multiplication work{linear, call};
    const Pieces pieces(call.tokens);
    const std::int64_t all = linear_blocks(linear), parts = (all + blocks - 1) / blocks * pieces.count;
    const std::int64_t width = blocks * kWeightRows;
    const std::size_t panel_floats = work.panel_floats(), sums_floats = static_cast<std::size_t>(kRowsInCache * width);
    for_each_part(parts, call.threads, sums_floats + panel_floats * static_cast<std::size_t>(blocks),
                  [&](std::int64_t index, float* scratch) {
                      const std::int64_t part = spread(index, parts, call.threads), piece = part % pieces.count;
                      const std::int64_t first = part / pieces.count * blocks,
                                         present = std::min<std::int64_t>(blocks, all - first);
                      const float* panels[kMostBlocks];
                      for (std::int64_t i = 0; i < present; ++i) {
                          float* place = scratch + sums_floats + static_cast<std::size_t>(i) * panel_floats;
                          panels[i] = work.panel(first + i, place);
                      }
                      const std::int64_t begin = pieces.first(piece), stop = begin + pieces.length(piece);
                      for (std::int64_t token = begin; token < stop; token += kRowsInCache) {
                          const std::int64_t tokens = std::min(kRowsInCache, stop - token);
                          if ((first + blocks) * kWeightRows > linear.rows) {
                              std::fill_n(scratch, sums_floats, 0.0f);
                          }
                          for (std::int64_t i = 0; i < present; ++i) {
                              const Share share{work.block_bytes * (token - begin) / (stop - begin),
                                                work.block_bytes * (token + tokens - begin) / (stop - begin)};
                              work.multiply(first + i, panels[i], token, tokens, {scratch + i * kWeightRows, width},
                                            first + blocks + i, share);
                          }
                          function(body, {token, tokens, first * kWeightRows, width, scratch});
                      }
                  });
}

}  // namespace rsvlm
