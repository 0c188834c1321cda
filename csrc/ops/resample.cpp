// Two passes of 22-bit fixed-point convolution. Coefficients follow Pillow's Resample.c (MIT-CMU) in double, operation by
// operation, because a coefficient that rounds differently is a pixel that differs.
#include "rsvlm/resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "rsvlm/cpu.h"

namespace rsvlm {
namespace {

constexpr int kPrecisionBits = 32 - 8 - 2;
constexpr std::int32_t kHalf = 1 << (kPrecisionBits - 1);
constexpr int kRows = 16;   // rows that one step of the horizontal pass handles, one per SIMD lane
constexpr int kBytes = 64;  // bytes of a row that one step of the vertical pass handles
// Below about half a millisecond of work a parallel region is not worth its risk: on a busy machine one preempted thread
// costs all of them a scheduler slice (4 ms measured).
constexpr std::int64_t kParallelBytes = 1 << 20;
constexpr double kPi = 3.14159265358979323846;

double bilinear(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    if (x < 2.0) {
        return (((x - 5) * x + 8) * x - 4) * a;
    }
    return 0.0;
}

double sinc(double x) {
    if (x == 0.0) {
        return 1.0;
    }
    x = x * kPi;
    return std::sin(x) / x;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

struct Kernel {
    double (*weight)(double);
    double support;
};

Kernel kernel_of(Resample filter) {
    switch (filter) {
        case Resample::bilinear:
            return {bilinear, 1.0};
        case Resample::bicubic:
            return {bicubic, 2.0};
        default:
            return {lanczos, 3.0};
    }
}

// Coefficients of the outputs [first, last) of one axis.
struct Axis {
    std::vector<std::int64_t> begin;    // first input of each output
    std::vector<std::int64_t> count;    // number of inputs of each output
    std::vector<std::int32_t> weights;  // [outputs, taps]
    std::int64_t taps = 0;
    std::int64_t input_first = 0;  // the inputs that all outputs together need
    std::int64_t input_last = 0;
};

Axis make_axis(std::int64_t in_size, std::int64_t out_size, std::int64_t first, std::int64_t last, const Kernel& kernel) {
    Axis axis;
    const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
    const double filter_scale = std::max(scale, 1.0);
    const double support = kernel.support * filter_scale;
    const double inverse = 1.0 / filter_scale;
    axis.taps = static_cast<std::int64_t>(std::ceil(support)) * 2 + 1;
    axis.weights.assign(static_cast<std::size_t>((last - first) * axis.taps), 0);
    std::vector<double> raw(static_cast<std::size_t>(axis.taps));
    for (std::int64_t out = first; out < last; ++out) {
        const double center = (static_cast<double>(out) + 0.5) * scale;
        const std::int64_t low = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5), 0);
        const std::int64_t high = std::min(static_cast<std::int64_t>(center + support + 0.5), in_size);
        double total = 0.0;
        for (std::int64_t i = 0; i < high - low; ++i) {
            raw[static_cast<std::size_t>(i)] = kernel.weight((static_cast<double>(i + low) - center + 0.5) * inverse);
            total += raw[static_cast<std::size_t>(i)];
        }
        std::int32_t* weights = axis.weights.data() + (out - first) * axis.taps;
        for (std::int64_t i = 0; i < high - low; ++i) {
            const double weight = (total != 0.0 ? raw[static_cast<std::size_t>(i)] / total : raw[static_cast<std::size_t>(i)]);
            weights[i] = static_cast<std::int32_t>((weight < 0 ? -0.5 : 0.5) + weight * (1 << kPrecisionBits));
        }
        axis.begin.push_back(low);
        axis.count.push_back(high - low);
    }
    axis.input_first = axis.begin.front();
    axis.input_last = axis.begin.back() + axis.count.back();
    return axis;
}

inline std::uint8_t clip8(std::int32_t sum) {
    return static_cast<std::uint8_t>(std::min(std::max(sum >> kPrecisionBits, 0), 255));
}

// One output row: bytes [0, row_bytes) of `count` input rows, weighted.
RSVLM_MULTIVERSION
void vertical_row(const std::uint8_t* rows, std::int64_t row_stride, const std::int32_t* weights, std::int64_t count,
                  std::int64_t row_bytes, std::uint8_t* out) {
    std::int64_t start = 0;
    for (; start + kBytes <= row_bytes; start += kBytes) {
        std::int32_t sums[kBytes];
        for (int i = 0; i < kBytes; ++i) {
            sums[i] = kHalf;
        }
        for (std::int64_t k = 0; k < count; ++k) {
            const std::uint8_t* row = rows + k * row_stride + start;
            const std::int32_t weight = weights[k];
            for (int i = 0; i < kBytes; ++i) {
                sums[i] += row[i] * weight;
            }
        }
        for (int i = 0; i < kBytes; ++i) {
            out[start + i] = clip8(sums[i]);
        }
    }
    for (; start < row_bytes; ++start) {
        std::int32_t sum = kHalf;
        for (std::int64_t k = 0; k < count; ++k) {
            sum += rows[k * row_stride + start] * weights[k];
        }
        out[start] = clip8(sum);
    }
}

// kRows rows at once. `columns` holds the input transposed, [input pixels, 3, kRows], and `result` gets [outputs, 3, kRows]:
// the convolution along a row becomes the same multiply-add in every lane.
RSVLM_MULTIVERSION
void horizontal_block(const std::uint8_t* columns, const Axis& axis, std::int64_t input_first, std::uint8_t* result) {
    const std::int64_t outputs = static_cast<std::int64_t>(axis.begin.size());
    for (std::int64_t out = 0; out < outputs; ++out) {
        const std::int32_t* weights = axis.weights.data() + out * axis.taps;
        const std::int64_t count = axis.count[static_cast<std::size_t>(out)];
        const std::uint8_t* input = columns + (axis.begin[static_cast<std::size_t>(out)] - input_first) * 3 * kRows;
        std::int32_t sums[3 * kRows];
        for (int i = 0; i < 3 * kRows; ++i) {
            sums[i] = kHalf;
        }
        for (std::int64_t k = 0; k < count; ++k) {
            const std::int32_t weight = weights[k];
            for (int i = 0; i < 3 * kRows; ++i) {
                sums[i] += input[k * 3 * kRows + i] * weight;
            }
        }
        for (int i = 0; i < 3 * kRows; ++i) {
            result[out * 3 * kRows + i] = clip8(sums[i]);
        }
    }
}

// `rows` starts at input pixel `input_first` of the first row.
void horizontal_pass(const std::uint8_t* rows, std::int64_t row_stride, std::int64_t num_rows, const Axis& axis,
                     std::int64_t input_first, std::uint8_t* out, std::int64_t out_row_stride) {
    const std::int64_t in_bytes = (axis.input_last - input_first) * 3;
    const std::int64_t out_bytes = static_cast<std::int64_t>(axis.begin.size()) * 3;
    const std::int64_t blocks = (num_rows + kRows - 1) / kRows;
#ifdef _OPENMP
#pragma omp parallel if (num_rows * in_bytes > kParallelBytes)
#endif
    {
        std::vector<std::uint8_t> columns(static_cast<std::size_t>(in_bytes * kRows));
        std::vector<std::uint8_t> result(static_cast<std::size_t>(out_bytes * kRows));
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t first = block * kRows;
            const int valid = static_cast<int>(std::min<std::int64_t>(kRows, num_rows - first));
            const std::uint8_t* lanes[kRows];
            for (int lane = 0; lane < kRows; ++lane) {  // a short last block repeats its last row
                lanes[lane] = rows + (first + std::min(lane, valid - 1)) * row_stride;
            }
            for (std::int64_t i = 0; i < in_bytes; ++i) {
                for (int lane = 0; lane < kRows; ++lane) {
                    columns[static_cast<std::size_t>(i * kRows + lane)] = lanes[lane][i];
                }
            }
            horizontal_block(columns.data(), axis, input_first, result.data());
            for (int lane = 0; lane < valid; ++lane) {
                std::uint8_t* target = out + (first + lane) * out_row_stride;
                for (std::int64_t i = 0; i < out_bytes; ++i) {
                    target[i] = result[static_cast<std::size_t>(i * kRows + lane)];
                }
            }
        }
    }
}

// `rows` starts at input row `input_first`.
void vertical_pass(const std::uint8_t* rows, std::int64_t row_stride, std::int64_t row_bytes, const Axis& axis,
                   std::int64_t input_first, std::uint8_t* out, std::int64_t out_row_stride) {
    const std::int64_t outputs = static_cast<std::int64_t>(axis.begin.size());
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (outputs * row_bytes > kParallelBytes)
#endif
    for (std::int64_t row = 0; row < outputs; ++row) {
        const auto index = static_cast<std::size_t>(row);
        vertical_row(rows + (axis.begin[index] - input_first) * row_stride, row_stride, axis.weights.data() + row * axis.taps,
                     axis.count[index], row_bytes, out + row * out_row_stride);
    }
}

}  // namespace

void resample_part(const ImageView& image, std::int64_t canvas_height, std::int64_t canvas_width, const Rectangle& part,
                   Resample filter, bool vertical_first, std::uint8_t* out, std::int64_t out_row_stride) {
    const Kernel kernel = kernel_of(filter);
    const std::int64_t rows = part.y1 - part.y0;
    const std::int64_t out_bytes = (part.x1 - part.x0) * 3;
    const bool need_horizontal = canvas_width != image.width;
    const bool need_vertical = canvas_height != image.height;
    if (!need_horizontal && !need_vertical) {
        for (std::int64_t row = 0; row < rows; ++row) {
            std::memcpy(out + row * out_row_stride, image.pixels + (part.y0 + row) * image.row_stride + part.x0 * 3,
                        static_cast<std::size_t>(out_bytes));
        }
        return;
    }
    if (!need_horizontal) {
        const Axis axis = make_axis(image.height, canvas_height, part.y0, part.y1, kernel);
        vertical_pass(image.pixels + part.x0 * 3, image.row_stride, out_bytes, axis, 0, out, out_row_stride);
        return;
    }
    const Axis across = make_axis(image.width, canvas_width, part.x0, part.x1, kernel);
    const std::uint8_t* left = image.pixels + across.input_first * 3;
    if (!need_vertical) {
        horizontal_pass(left + part.y0 * image.row_stride, image.row_stride, rows, across, across.input_first, out,
                        out_row_stride);
        return;
    }
    const Axis down = make_axis(image.height, canvas_height, part.y0, part.y1, kernel);
    if (vertical_first) {
        const std::int64_t in_bytes = (across.input_last - across.input_first) * 3;
        std::vector<std::uint8_t> middle(static_cast<std::size_t>(rows * in_bytes));
        vertical_pass(left, image.row_stride, in_bytes, down, 0, middle.data(), in_bytes);
        horizontal_pass(middle.data(), in_bytes, rows, across, across.input_first, out, out_row_stride);
    } else {
        const std::int64_t in_rows = down.input_last - down.input_first;
        std::vector<std::uint8_t> middle(static_cast<std::size_t>(in_rows * out_bytes));
        horizontal_pass(left + down.input_first * image.row_stride, image.row_stride, in_rows, across, across.input_first,
                        middle.data(), out_bytes);
        vertical_pass(middle.data(), out_bytes, out_bytes, down, down.input_first, out, out_row_stride);
    }
}

}  // namespace rsvlm
