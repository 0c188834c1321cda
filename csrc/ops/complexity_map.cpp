#include "rsvlm/complexity_map.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "rsvlm/cpu.h"

namespace rsvlm {
namespace {

constexpr double kSobelScale = 2040.0;   // the largest |gx| + |gy| of uint8 input
constexpr std::int64_t kSegment = 8192;  // 8192 * 255^2 < 2^31: int32 prefix sums inside a segment cannot overflow

// out = above + (carry + inclusive prefix sum of values), all exact integers; returns the new carry.
RSVLM_MULTIVERSION
double add_prefix(const std::int32_t* values, std::int64_t count, double carry, const double* above, double* out) {
    std::int32_t prefix[kSegment];
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        sum += values[i];
        prefix[i] = sum;
    }
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = above[i] + (carry + static_cast<double>(prefix[i]));
    }
    return carry + static_cast<double>(sum);
}

// |gx| + |gy| of one row, 0 where the 3x3 neighbourhood (border replicated) is not all valid.
RSVLM_MULTIVERSION
void sobel_row(const std::uint8_t* const gray[3], const std::uint8_t* const mask[3], std::int64_t width, std::int32_t* out) {
    const auto at = [&](std::int64_t x, std::int64_t left, std::int64_t right) {
        const int gx =
            (gray[0][right] + 2 * gray[1][right] + gray[2][right]) - (gray[0][left] + 2 * gray[1][left] + gray[2][left]);
        const int gy = (gray[2][left] + 2 * gray[2][x] + gray[2][right]) - (gray[0][left] + 2 * gray[0][x] + gray[0][right]);
        int valid = 1;
        for (int row = 0; row < 3; ++row) {
            valid &= mask[row][left] & mask[row][x] & mask[row][right];
        }
        return valid * (std::abs(gx) + std::abs(gy));
    };
    out[0] = at(0, 0, std::min<std::int64_t>(1, width - 1));
    for (std::int64_t x = 1; x < width - 1; ++x) {
        out[x] = at(x, x - 1, x + 1);
    }
    if (width > 1) {
        out[width - 1] = at(width - 1, width - 2, width - 1);
    }
}

// One row of one channel, except the Sobel channel.
RSVLM_MULTIVERSION
void channel_row(int channel, const std::uint8_t* gray, const std::uint8_t* mask, std::int64_t width, std::int32_t* out) {
    if (channel == 0) {
        for (std::int64_t x = 0; x < width; ++x) {
            out[x] = mask[x];
        }
    } else if (channel == 1) {
        for (std::int64_t x = 0; x < width; ++x) {
            out[x] = gray[x] * mask[x];
        }
    } else if (channel == 2) {
        for (std::int64_t x = 0; x < width; ++x) {
            out[x] = gray[x] * gray[x] * mask[x];
        }
    } else {
        const int bin = channel - 4;
        for (std::int64_t x = 0; x < width; ++x) {
            out[x] = ((gray[x] >> 4) == bin) & mask[x];
        }
    }
}

void fill_channel(int channel, const std::uint8_t* gray, const std::uint8_t* mask, std::int64_t height, std::int64_t width,
                  double* table) {
    std::vector<std::int32_t> values(static_cast<std::size_t>(width));
    std::fill(table, table + width + 1, 0.0);
    for (std::int64_t row = 0; row < height; ++row) {
        const std::uint8_t* gray_row = gray + row * width;
        const std::uint8_t* mask_row = mask + row * width;
        if (channel == 3) {
            const std::int64_t up = row > 0 ? -width : 0;
            const std::int64_t down = row + 1 < height ? width : 0;
            const std::uint8_t* gray_rows[3] = {gray_row + up, gray_row, gray_row + down};
            const std::uint8_t* mask_rows[3] = {mask_row + up, mask_row, mask_row + down};
            sobel_row(gray_rows, mask_rows, width, values.data());
        } else {
            channel_row(channel, gray_row, mask_row, width, values.data());
        }
        const double* above = table + row * (width + 1) + 1;
        double* out = table + (row + 1) * (width + 1) + 1;
        out[-1] = 0.0;
        double carry = 0.0;
        for (std::int64_t start = 0; start < width; start += kSegment) {
            const std::int64_t count = std::min(kSegment, width - start);
            carry = add_prefix(values.data() + start, count, carry, above + start, out + start);
        }
    }
    if (channel == 3) {
        const std::int64_t size = (height + 1) * (width + 1);
        for (std::int64_t i = 0; i < size; ++i) {
            table[i] /= kSobelScale;
        }
    }
}

}  // namespace

void complexity_map(const std::uint8_t* gray, const std::uint8_t* mask, std::int64_t height, std::int64_t width,
                    double* tables) {
    if (height < 1 || width < 1) {
        throw std::invalid_argument("gray must be at least 1 by 1 pixel, got " + std::to_string(height) + " by " +
                                    std::to_string(width) + "; pass a non-empty overview");
    }
    const std::int64_t plane = (height + 1) * (width + 1);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) if (plane > 65536)
#endif
    for (int channel = 0; channel < kComplexityChannels; ++channel) {
        fill_channel(channel, gray, mask, height, width, tables + channel * plane);
    }
}

}  // namespace rsvlm
