// Rows of SceneModel on their way from one product to the next one.
#pragma once

#include <algorithm>

#include "rsvlm/parallel.h"
#include "rsvlm/scene_model.h"

namespace rsvlm {

// body(row, scratch) for all rows, on all threads, each with `floats` floats of its own.
template <class Body>
void for_rows(std::int64_t count, int threads, std::int64_t floats, const Body& body) {
    constexpr std::int64_t kRowsAtOnce = 16;  // some microseconds of work
    const std::int64_t parts = (count + kRowsAtOnce - 1) / kRowsAtOnce;
    for_each_part(parts, threads, static_cast<std::size_t>(floats), [&](std::int64_t part, float* scratch) {
        for (std::int64_t row = part * kRowsAtOnce; row < std::min((part + 1) * kRowsAtOnce, count); ++row) {
            body(row, scratch);
        }
    });
}

template <class Make>
SceneModel::InputRows SceneModel::write_rows(Workspace& work, const Linear& linear, std::int64_t count, const Make& make) {
    const Operand operand = operand_of(linear);
    const std::int64_t bytes = operand_row_bytes(operand, linear.columns);
    char* rows = work.inputs.hold<char>(count * bytes);
    for_rows(count, work.threads, padded_columns(linear.columns), [&](std::int64_t n, float* row) {
        make(n, row);
        write_operand_row(operand, row, linear.columns, rows + n * bytes);
    });
    return {rows, count};
}

}  // namespace rsvlm
