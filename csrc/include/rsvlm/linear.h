// Products with the weights of a package, as they lie in its file. Knows no model, no file and no Python.
#pragma once

#include <cstdint>

#include "rsvlm/weight_matmul.h"

namespace rsvlm {

enum class LinearKind { kFloat32, kBf16, kInt8, kInt4 };

// One weight [rows, columns] in the layout of weight_matmul (scales float16); float32 lies as bf16 does, with wider values.
struct Linear {
    LinearKind kind = LinearKind::kFloat32;
    std::int64_t rows = 0, columns = 0;
    const char* layout = nullptr;
    const float* bias = nullptr;  // [rows] or null
    bool int8_inputs = false;     // of an int8 or int4 weight: rows of x are rounded to int8, a scale per 32 columns
};

// Columns as the kernels read them: a multiple of 32, zeros behind the last one.
inline std::int64_t padded_columns(std::int64_t columns) { return (columns + 31) / 32 * 32; }

// Throws std::invalid_argument for a shape that the kind cannot hold.
std::int64_t linear_layout_bytes(const Linear& linear);
std::int64_t linear_block_bytes(const Linear& linear);
// Blocks of 32 rows.
inline std::int64_t linear_blocks(const Linear& linear) { return (linear.rows + 31) / 32; }

// One row of the weight -> float32 [columns]; this is how a table of embeddings is read.
void read_linear_row(const Linear& linear, std::int64_t row, float* to);

// Few rows of x: blocks first..stop of the weight, read once whatever `tokens` is. For the calling thread alone.
// x [tokens, padded_columns] -> out [tokens, linear.rows], columns 32 * first .. 32 * stop of it, bias added. `scratch` holds
// few_scratch_floats. A row's bits depend on no other row and not on how blocks are dealt out.
void multiply_few(const Linear& linear, const float* x, std::int64_t tokens, std::int64_t first, std::int64_t stop, float* out,
                  float* scratch);
std::int64_t few_scratch_floats(std::int64_t columns, std::int64_t tokens);

// How rows of x are kept for multiply_many: rounded to int8 where the linear says so (in an order of columns that int8 and int4
// weights have each for itself), else bf16 where the CPU has its dot product and the weight is no float32.
enum class Operand { kFloat32, kBf16, kInt8, kInt8ForInt4 };
Operand operand_of(const Linear& linear);
std::int64_t operand_row_bytes(Operand operand, std::int64_t columns);
// One row x [columns] -> its operand_row_bytes, padding included. A value that is no number spoils its group of 32 columns.
void write_operand_row(Operand operand, const float* x, std::int64_t columns, void* to);
// Columns `column`..`column` + 31 (a multiple of 32) of `rows` rows, which lie one after another in x [rows, 32] -> rows of
// `to`. Padding comes as zeros of x. Gives the bytes that write_operand_row gives.
void write_operand_columns(Operand operand, const float* x, std::int64_t rows, std::int64_t column, std::int64_t columns,
                           void* to);

struct ManyRows {
    const void* x;  // [tokens] rows of the operand
    Operand operand;
    std::int64_t tokens;
    int threads;  // at most
};
// What happens to the products: out = xW + b, or out += scale * (xW + b).
struct ProductsTo {
    float* out;  // [tokens, out_stride]
    std::int64_t out_stride;
    bool add = false;
    const float* scale = nullptr;  // [rows]; null = 1
};
// Many rows of x: each block is unpacked once per some 240 rows. Bits as for multiply_few, but not the same bits, unless inputs
// are rounded to int8: then they are.
void multiply_many(const Linear& linear, const ManyRows& call, const ProductsTo& to);

// Some rows of xW + b, in the cache of the thread that has just made them: sums [tokens, columns] on a 64-byte boundary, zeros
// behind the last column, the receiver's to overwrite.
struct Products {
    std::int64_t token, tokens, column, columns;
    float* sums;
};
using ProductsFunction = void (*)(const void* body, const Products& products);
void pass_products(const Linear& linear, const ManyRows& call, int blocks, ProductsFunction function, const void* body);

// body(products) for all of xW + b, `blocks` neighbouring blocks of 32 columns at a time, from all threads.
template <class Body>
void multiply_into(const Linear& linear, const ManyRows& call, int blocks, const Body& body) {
    pass_products(
        linear, call, blocks, [](const void* self, const Products& products) { (*static_cast<const Body*>(self))(products); },
        &body);
}

}  // namespace rsvlm
