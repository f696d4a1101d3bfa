// Questions to Grams in the host's memory, where a call of torch's for every step takes longer than
// the numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace domerge {

template <class T>
bool row_within(const T* x, int64_t size, int64_t distance, double low, double high) {
    for (int64_t k = 0; k < size; ++k) {
        const double one = x[k * distance];
        if (!(one >= low && one <= high)) return false;
    }
    return true;
}

// Whether no number of `count` rows of `size` is outside of low and high; NaN is. step: from one
// row to the next, distance: from one number of it to the next, in elements; wide: of float64.
inline bool within(uint64_t first, int64_t count, int64_t size, int64_t step, int64_t distance,
                   bool wide, double low, double high) {
    const pybind11::gil_scoped_release release;
    for (int64_t p = 0; p < count; ++p) {
        const bool fits = wide ? row_within(reinterpret_cast<const double*>(first) + p * step, size,
                                            distance, low, high)
                               : row_within(reinterpret_cast<const float*>(first) + p * step, size,
                                            distance, low, high);
        if (!fits) return false;
    }
    return true;
}

// The sum of `rank` numbers at equal distances.
template <class T>
double spaced_sum(const T* x, int64_t rank, int64_t distance) {
    double sum = 0;
    for (int64_t k = 0; k < rank; ++k) sum += x[k * distance];
    return sum;
}

// How many times the norms of two adapters' factors are apart, at most, but for those of `least` of
// the largest one or less. The squared norms are sums of ranks[i] numbers that follow each other in
// each of `count` rows; step: from one row to the next, distance: from one number of it to the
// next, in elements; wide: of float64.
inline double norms_apart(uint64_t first, int64_t count, int64_t step, int64_t distance,
                          const std::vector<int64_t>& ranks, bool wide, double least) {
    const pybind11::gil_scoped_release release;
    std::vector<double> squares(ranks.size());
    double most = 1;
    for (int64_t p = 0; p < count; ++p) {
        int64_t at = p * step;
        for (size_t i = 0; i < ranks.size(); ++i) {
            squares[i] =
                wide ? spaced_sum(reinterpret_cast<const double*>(first) + at, ranks[i], distance)
                     : spaced_sum(reinterpret_cast<const float*>(first) + at, ranks[i], distance);
            at += ranks[i] * distance;
        }
        const double high = *std::max_element(squares.begin(), squares.end());
        double low = high;
        for (const double x : squares)
            if (x > least * least * high) low = std::min(low, x);
        if (low > 0) most = std::max(most, high / low);
    }
    return std::sqrt(most);
}

// x_ij / (y_i y_j) of `count` dense matrices [size, size] and vectors [size], 0 where the divisor
// is not above 0.
inline void over_products(uint64_t given, uint64_t sizes, int64_t count, int64_t size,
                          uint64_t out) {
    const pybind11::gil_scoped_release release;
    const auto* x = reinterpret_cast<const double*>(given);
    const auto* y = reinterpret_cast<const double*>(sizes);
    auto* found = reinterpret_cast<double*>(out);
    for (int64_t p = 0; p < count; ++p, y += size)
        for (int64_t i = 0; i < size; ++i)
            for (int64_t j = 0; j < size; ++j, ++x, ++found) {
                const double product = y[i] * y[j];
                *found = product > 0 ? *x / product : 0.0;
            }
}

}  // namespace domerge
