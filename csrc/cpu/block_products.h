// The sums of x_ij y_ij over every block of two R x R matrices, in double.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

// out [count, count]; x, y [rank, rank]
inline void block_products(const float* x, const float* y, int64_t rank, const int64_t* ranks,
                           int64_t count, double* out, Arena& arena) {
    double* columns = static_cast<double*>(arena.take(rank * sizeof(double)));
    for (int64_t i = 0; i < count; ++i) {
        poll();
        for (int64_t c = 0; c < rank; ++c) columns[c] = 0.0;
        for (int64_t r = 0; r < ranks[i]; ++r, x += rank, y += rank)
            for (int64_t c = 0; c < rank; ++c)
                columns[c] += static_cast<double>(x[c]) * static_cast<double>(y[c]);
        const double* column = columns;
        for (int64_t j = 0; j < count; ++j) {
            double sum = 0.0;
            for (int64_t c = 0; c < ranks[j]; ++c) sum += *column++;
            out[i * count + j] = sum;
        }
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
