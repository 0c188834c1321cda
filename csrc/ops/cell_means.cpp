#include "rsvlm/cell_means.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "rsvlm/cpu.h"

// Inside of a function that is compiled once per instruction set, and so compiled with it.
#define RSVLM_INLINE inline __attribute__((always_inline))

namespace rsvlm {
namespace {

constexpr std::int64_t kSegment = 4096;  // columns at a time, so that their sums and counts stay in the first cache

// Integers of 1 and 2 bytes are summed in 32 bits, exactly; all else in float64, in the definition's order.
template <typename T>
constexpr bool kExact = std::is_integral_v<T> && sizeof(T) <= 2;
template <typename T>
using Sum = std::conditional_t<kExact<T>, std::int32_t, double>;

// Which pixels of a row count.
enum class Rule { kAll, kNodata, kMask };

template <typename T, Rule rule>
RSVLM_INLINE bool counts(T value, [[maybe_unused]] T nodata, [[maybe_unused]] const std::uint8_t* valid,
                         [[maybe_unused]] std::int64_t x) {
    bool ok = true;
    if constexpr (std::is_floating_point_v<T>) {
        ok = value - value == T(0);  // neither infinity nor NaN
    }
    if constexpr (rule == Rule::kNodata) {
        ok = value != nodata;
    } else if constexpr (rule == Rule::kMask) {
        ok = ok & (valid[x] != 0);
    }
    return ok;
}

// Sums and counts of each column over kRows rows: written, or added to what is there.
template <typename T, Rule rule, int kRows, bool kFirst>
RSVLM_INLINE void add_rows(const T* values, const std::uint8_t* valid, std::int64_t stride, std::int64_t width, T nodata,
                           Sum<T>* __restrict sums, std::int32_t* __restrict found) {
    for (std::int64_t x = 0; x < width; ++x) {
        Sum<T> sum = kFirst ? Sum<T>(0) : sums[x];
        std::int32_t count = kFirst ? 0 : found[x];
        for (int row = 0; row < kRows; ++row) {
            const T value = values[row * stride + x];
            const bool ok = counts<T, rule>(value, nodata, valid, row * stride + x);
            const Sum<T> term = ok ? static_cast<Sum<T>>(value) : Sum<T>(0);
            sum = kFirst && row == 0 ? term : sum + term;
            count += ok;
        }
        sums[x] = sum;
        found[x] = count;
    }
}

// The same over all rows of a row of cells, from top to bottom.
template <typename T, Rule rule>
RSVLM_INLINE void column_sums(const T* values, const std::uint8_t* valid, std::int64_t stride, std::int64_t rows,
                              std::int64_t width, T nodata, Sum<T>* sums, std::int32_t* found) {
    constexpr int kRows = kExact<T> ? 4 : 1;  // in registers at a time: few passes over the sums
    const auto mask = [&](std::int64_t row) { return rule == Rule::kMask ? valid + row * stride : nullptr; };
    std::int64_t row = 0;
    if (rows >= kRows) {
        add_rows<T, rule, kRows, true>(values, mask(0), stride, width, nodata, sums, found);
        row = kRows;
    } else {
        add_rows<T, rule, 1, true>(values, mask(0), stride, width, nodata, sums, found);
        row = 1;
    }
    for (; row + kRows <= rows; row += kRows) {
        add_rows<T, rule, kRows, false>(values + row * stride, mask(row), stride, width, nodata, sums, found);
    }
    for (; row < rows; ++row) {
        add_rows<T, rule, 1, false>(values + row * stride, mask(row), stride, width, nodata, sums, found);
    }
}

// Sums of `factor` neighbours each, halving again and again; `values` and `spare` take turns. Gives the one that holds the
// sums.
RSVLM_INLINE std::int32_t* neighbour_sums(std::int32_t* values, std::int32_t* spare, std::int64_t count, std::int64_t factor) {
    for (; factor > 1; factor /= 2) {
        count /= 2;
        const std::int32_t* __restrict from = values;
        std::int32_t* __restrict to = spare;
        for (std::int64_t i = 0; i < count; ++i) {
            to[i] = from[2 * i] + from[2 * i + 1];
        }
        std::swap(values, spare);
    }
    return values;
}

// Rounded to the nearest, halves up, inside the range of T.
template <typename T>
RSVLM_INLINE T rounded(double mean) {
    if constexpr (std::is_integral_v<T>) {
        using Limits = std::numeric_limits<T>;
        double highest = static_cast<double>(Limits::max());
        if constexpr (sizeof(T) == 8) {  // 2^63 - 1 is no float64
            highest = std::nextafter(highest, 0.0);
        }
        return static_cast<T>(std::min(std::max(std::floor(mean + 0.5), static_cast<double>(Limits::min())), highest));
    } else {
        return static_cast<T>(mean);
    }
}

// One row of cells from exact totals. Cells with a gap are few: the rims of nodata and of the raster.
template <typename T, typename Total>
RSVLM_INLINE void exact_means(const Total* totals, const std::int32_t* found, std::int64_t cells, std::int64_t factor,
                              T* __restrict means, std::uint8_t* __restrict flags) {
    const std::int64_t full = factor * factor;
    const auto half = static_cast<Total>(full / 2);
    int shift = 0;
    for (std::int64_t rest = full; rest > 1; rest /= 2) {
        ++shift;
    }
    std::int32_t whole = 0;
    for (std::int64_t i = 0; i < cells; ++i) {
        means[i] = static_cast<T>((totals[i] + half) >> shift);
        flags[i] = found[i] > 0;
        whole += found[i] == static_cast<std::int32_t>(full);
    }
    for (std::int64_t i = 0; whole < cells && i < cells; ++i) {
        if (found[i] != full && found[i] > 0) {  // an empty cell has a total of 0, and so a mean of 0
            const double mean = static_cast<double>(totals[i]) / static_cast<double>(found[i]);
            means[i] = static_cast<T>(std::floor(mean + 0.5));
        }
    }
}

// What one call works in, allocated once.
struct Scratch {
    std::vector<std::int32_t> narrow_sums, narrow_spare, found, found_spare;
    std::vector<double> wide_sums;
    std::vector<std::int64_t> totals;
};

// A part of one row of cells: `rows` rows of `width` pixels.
template <typename T, Rule rule>
RSVLM_INLINE void cell_row(const T* values, const std::uint8_t* valid, std::int64_t stride, std::int64_t rows,
                           std::int64_t width, std::int64_t factor, T nodata, Scratch& scratch, T* means, std::uint8_t* flags) {
    const std::int64_t cells = (width + factor - 1) / factor;
    std::int32_t* found = scratch.found.data();
    if constexpr (kExact<T>) {
        std::int32_t* sums = scratch.narrow_sums.data();
        column_sums<T, rule>(values, valid, stride, rows, width, nodata, sums, found);
        std::fill(sums + width, sums + cells * factor, 0);
        std::fill(found + width, found + cells * factor, 0);
        found = neighbour_sums(found, scratch.found_spare.data(), cells * factor, factor);
        if (factor <= 128) {  // 128 * 128 * 65,535 < 2^31
            sums = neighbour_sums(sums, scratch.narrow_spare.data(), cells * factor, factor);
            exact_means<T>(sums, found, cells, factor, means, flags);
            return;
        }
        for (std::int64_t i = 0; i < cells; ++i) {
            std::int64_t total = 0;
            for (std::int64_t x = i * factor; x < (i + 1) * factor; ++x) {
                total += sums[x];
            }
            scratch.totals[static_cast<std::size_t>(i)] = total;
        }
        exact_means<T>(scratch.totals.data(), found, cells, factor, means, flags);
    } else {
        double* sums = scratch.wide_sums.data();
        column_sums<T, rule>(values, valid, stride, rows, width, nodata, sums, found);
        for (std::int64_t i = 0; i < cells; ++i) {
            const std::int64_t first = i * factor, stop = std::min(first + factor, width);
            double total = sums[first];
            std::int32_t count = found[first];
            for (std::int64_t x = first + 1; x < stop; ++x) {
                total += sums[x];
                count += found[x];
            }
            means[i] = rounded<T>(total / static_cast<double>(std::max(count, 1)));
            flags[i] = count > 0;
        }
    }
}

template <typename T>
RSVLM_INLINE void all_cells(const CellMeans& call, Scratch& scratch, std::int64_t segment) {
    const std::int64_t plane = call.height * call.width;
    for (std::int64_t band = 0; band < call.bands; ++band) {
        const T* values = static_cast<const T*>(call.values) + band * plane;
        const std::uint8_t* valid = call.valid == nullptr ? nullptr : call.valid + std::min(band, call.valid_bands - 1) * plane;
        const T nodata = call.nodata == nullptr ? T(0) : static_cast<const T*>(call.nodata)[band];
        for (std::int64_t top = 0; top < call.height; top += call.factor) {
            const std::int64_t rows = std::min(call.factor, call.height - top), cell = top / call.factor;
            T* means = static_cast<T*>(call.means) + band * call.means_band_stride + cell * call.means_row_stride;
            std::uint8_t* flags = call.found + band * call.found_band_stride + cell * call.found_row_stride;
            for (std::int64_t left = 0; left < call.width; left += segment) {
                const std::int64_t width = std::min(segment, call.width - left), at = top * call.width + left;
                T* mean = means + left / call.factor;
                std::uint8_t* flag = flags + left / call.factor;
                if (valid != nullptr) {
                    cell_row<T, Rule::kMask>(values + at, valid + at, call.width, rows, width, call.factor, nodata, scratch,
                                             mean, flag);
                    continue;
                }
                if constexpr (std::is_integral_v<T>) {
                    if (call.nodata != nullptr) {
                        cell_row<T, Rule::kNodata>(values + at, nullptr, call.width, rows, width, call.factor, nodata, scratch,
                                                   mean, flag);
                        continue;
                    }
                }
                cell_row<T, Rule::kAll>(values + at, nullptr, call.width, rows, width, call.factor, nodata, scratch, mean,
                                        flag);
            }
        }
    }
}

RSVLM_MULTIVERSION
void run_small(const CellMeans& call, Scratch& scratch, std::int64_t segment) {
    switch (call.pixel) {
        case Pixel::kUint8:
            return all_cells<std::uint8_t>(call, scratch, segment);
        case Pixel::kInt8:
            return all_cells<std::int8_t>(call, scratch, segment);
        case Pixel::kUint16:
            return all_cells<std::uint16_t>(call, scratch, segment);
        default:
            return all_cells<std::int16_t>(call, scratch, segment);
    }
}

RSVLM_MULTIVERSION
void run_wide(const CellMeans& call, Scratch& scratch, std::int64_t segment) {
    switch (call.pixel) {
        case Pixel::kUint32:
            return all_cells<std::uint32_t>(call, scratch, segment);
        case Pixel::kInt32:
            return all_cells<std::int32_t>(call, scratch, segment);
        case Pixel::kUint64:
            return all_cells<std::uint64_t>(call, scratch, segment);
        case Pixel::kInt64:
            return all_cells<std::int64_t>(call, scratch, segment);
        case Pixel::kFloat32:
            return all_cells<float>(call, scratch, segment);
        default:
            return all_cells<double>(call, scratch, segment);
    }
}

}  // namespace

void cell_means(const CellMeans& call) {
    if (call.bands < 1 || call.height < 1 || call.width < 1) {
        throw std::invalid_argument("values must be at least 1 band of 1 by 1 pixel, got " + std::to_string(call.bands) +
                                    " of " + std::to_string(call.height) + " by " + std::to_string(call.width) +
                                    "; pass what was read");
    }
    if (call.factor < 1 || call.factor > kLargestFactor || (call.factor & (call.factor - 1)) != 0) {
        throw std::invalid_argument("factor must be a power of two in 1.." + std::to_string(kLargestFactor) + ", got " +
                                    std::to_string(call.factor) + "; round it to one");
    }
    const bool floats = call.pixel == Pixel::kFloat32 || call.pixel == Pixel::kFloat64;
    if (call.nodata != nullptr && (floats || call.valid != nullptr)) {
        throw std::invalid_argument("nodata must be null for floats and beside valid, got both; pass valid alone");
    }
    const bool wide = call.pixel >= Pixel::kUint32;
    const std::int64_t segment = std::max(kSegment, call.factor);  // a multiple of factor: both are powers of two
    const auto columns =
        static_cast<std::size_t>(std::min(segment, (call.width + call.factor - 1) / call.factor * call.factor));
    Scratch scratch;
    scratch.found.resize(columns);
    if (wide) {
        scratch.wide_sums.resize(columns);
        run_wide(call, scratch, segment);
        return;
    }
    scratch.found_spare.resize(columns);
    scratch.narrow_sums.resize(columns);
    scratch.narrow_spare.resize(columns);
    scratch.totals.resize(columns / static_cast<std::size_t>(call.factor));
    run_small(call, scratch, segment);
}

}  // namespace rsvlm

#undef RSVLM_INLINE
