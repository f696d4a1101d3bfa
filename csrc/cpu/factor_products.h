// Products of float32 panels: a unit is [32 numbers along the sum, 32 columns].
#pragma once

#include <type_traits>

#include "factor_blocks.h"

namespace domerge {
namespace DOMERGE_ISA {

struct SingleProducts {
    using Format = Float32;
    using Number = float;
    static constexpr double kNoise = 0x1p-23;
    static constexpr int64_t kEstimated = 512;
    static constexpr int64_t kPanels = 1;
    static constexpr int64_t kBlockRows = 8;
    static constexpr int64_t kBlockColumns = 8;
    static constexpr int64_t kStretch = 4;  // units whose panels stay in L1
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr int kRows = 3, kVectors = 4;  // of sums in registers: 12 of 16
#else
    static constexpr int kRows = kTileRows, kVectors = 2;
#endif
    static constexpr int kLastRows = kUnit % kRows ? kUnit % kRows : kRows;
    static constexpr int64_t kTiles = (kUnit + kRows - 1) / kRows * (kUnit / kVectors / kWidth);
    static constexpr int64_t kLines = Piece::lines(kTiles * kStretch);

    // Of block [32 along the sum, 32 columns]; the left operand's is the same.
    static void pack_right(const float* block, float* right) {
        __builtin_memcpy(right, block, kUnitNumbers * sizeof(float));
    }
    static void pack_left(const float* block, float* left) { pack_right(block, left); }
    static void pack_both(const float* block, float*, float* right) { pack_right(block, right); }
    // Of block [32 rows, 32 along the sum].
    static void pack_rows(const float* block, float* left) {
        transpose(block, kUnit, kUnit, kUnit, left, kUnit);
    }

    // out [32, 32] = (first) or += left^T right over some units, while a piece at `ahead` is
    // fetched.
    static DOMERGE_INLINE void multiply(const float* left, const float* right, int64_t units,
                                        float* out, int64_t ld, bool first, const void* ahead) {
        Piece piece(ahead);
        for (int64_t j = 0; j < kUnit; j += kVectors * kWidth) {
            const auto tile = [&](auto rows, int64_t i) {
                multiply_tile<rows>(left + i, right + j, units, out + i * ld + j, ld, first, piece);
            };
            for (int64_t i = 0; i < kUnit - kLastRows; i += kRows)
                tile(std::integral_constant<int, kRows>{}, i);
            tile(std::integral_constant<int, kLastRows>{}, kUnit - kLastRows);
        }
    }

    template <int rows>
    static DOMERGE_INLINE void multiply_tile(const float* left, const float* right, int64_t units,
                                             float* out, int64_t ld, bool first, Piece& piece) {
        FloatVec sum[rows][kVectors] = {};
        for (int64_t u = 0; u < units; ++u) {
            piece.fetch(kLines);
            for (int64_t k = 0; k < kUnit; ++k, left += kUnit, right += kUnit)
                add_row<rows>(left, right, sum);
        }
#pragma GCC unroll 8
        for (int n = 0; n < rows; ++n) {
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
                float* at = out + n * ld + v * kWidth;
                store(at, first ? sum[n][v] : load<FloatVec>(at) + sum[n][v]);
            }
        }
    }

    template <int rows>
    static DOMERGE_INLINE void add_row(const float* left, const float* right,
                                       FloatVec (&sum)[rows][kVectors]) {
        FloatVec factor[rows];
#pragma GCC unroll 8
        for (int n = 0; n < rows; ++n) factor[n] = broadcast(left[n]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            const FloatVec row = load<FloatVec>(right + v * kWidth);
#pragma GCC unroll 8
            for (int n = 0; n < rows; ++n) sum[n][v] += row * factor[n];
        }
    }

    struct Session {};  // what products need set up while they are made
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
