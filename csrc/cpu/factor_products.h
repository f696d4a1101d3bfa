// Products of float32 panels: a unit is [32 numbers along the sum, 32 columns].
#pragma once

#include "factor_kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

struct SingleProducts {
    using Format = Float32;
    using Number = float;
    static constexpr double kNoise = 0x1p-23;
    static constexpr int64_t kPanels = 1;
    static constexpr int64_t kBlockRows = 8;
    static constexpr int64_t kBlockColumns = 8;
    static constexpr int64_t kStretch = 4;  // units whose panels stay in L1

    // Of block [32 along the sum, 32 columns]; the left operand's is the same.
    static void pack_right(const float* block, float* right) {
        __builtin_memcpy(right, block, kUnitNumbers * sizeof(float));
    }
    static void pack_both(const float* block, float*, float* right) { pack_right(block, right); }
    // Of block [32 rows, 32 along the sum].
    static void pack_rows(const float* block, float* left) {
        transpose(block, kUnit, kUnit, kUnit, left, kUnit);
    }

    // out [32, 32] = (first) or += left^T right over some units. These products take so long that
    // nothing has to be fetched ahead.
    static DOMERGE_INLINE void multiply(const float* left, const float* right, int64_t units,
                                        float* out, int64_t ld, bool first, const void*) {
        constexpr int rows = kTileRows, vectors = 2;
        for (int64_t j = 0; j < kUnit; j += vectors * kWidth) {
            for (int64_t i = 0; i < kUnit; i += rows) {
                FloatVec sum[rows][vectors] = {};
                const float *l = left + i, *r = right + j;
                for (int64_t k = 0; k < units * kUnit; ++k, l += kUnit, r += kUnit) {
                    FloatVec row[vectors];
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) row[v] = load<FloatVec>(r + v * kWidth);
#pragma GCC unroll 8
                    for (int n = 0; n < rows; ++n)
#pragma GCC unroll 8
                        for (int v = 0; v < vectors; ++v) sum[n][v] += row[v] * l[n];
                }
#pragma GCC unroll 8
                for (int n = 0; n < rows; ++n) {
#pragma GCC unroll 8
                    for (int v = 0; v < vectors; ++v) {
                        float* at = out + (i + n) * ld + j + v * kWidth;
                        store(at, first ? sum[n][v] : load<FloatVec>(at) + sum[n][v]);
                    }
                }
            }
        }
    }

    struct Session {};  // what products need set up while they are made
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
