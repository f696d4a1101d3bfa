// Questions to Grams in the host's memory, where a call of torch's for every step takes longer than
// the numbers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace domerge {

template <class T>
bool diagonal_within(const T* gram, int64_t rank, int64_t pitch, double low, double high) {
    for (int64_t k = 0; k < rank; ++k) {
        const double x = gram[k * (pitch + 1)];
        if (!(x >= low && x <= high)) return false;
    }
    return true;
}

// Whether the diagonals of `count` matrices [rank, rank] have no number outside of low and high,
// NaN being outside. step: from one to the next, pitch: from row to row, in elements; wide: of
// float64.
inline bool diagonals_within(uint64_t first, int64_t count, int64_t step, int64_t rank,
                             int64_t pitch, bool wide, double low, double high) {
    const pybind11::gil_scoped_release release;
    for (int64_t p = 0; p < count; ++p) {
        const bool fits = wide ? diagonal_within(reinterpret_cast<const double*>(first) + p * step,
                                                 rank, pitch, low, high)
                               : diagonal_within(reinterpret_cast<const float*>(first) + p * step,
                                                 rank, pitch, low, high);
        if (!fits) return false;
    }
    return true;
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
