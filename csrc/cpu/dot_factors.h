// Products of bfloat16 panels by AVX-512's dot products of pairs.
#pragma once

#include <immintrin.h>

#include "factor_blocks.h"
#include "half_products.h"

namespace domerge {
namespace DOMERGE_ISA {

struct DotProducts : HalfPanels {
    static constexpr int64_t kRows = 8;  // of sums in registers, two vectors each
    static constexpr int64_t kLines = Piece::lines(kUnit / kRows * kStretch);

    struct Session {};

    // out [32, 32] = (first) or += left right over some units, while a piece at `ahead` is fetched.
    static DOMERGE_INLINE void multiply(const uint16_t* left, const uint16_t* right, int64_t units,
                                        float* out, int64_t ld, bool first, const void* ahead) {
        Piece piece(ahead);
        for (int64_t i = 0; i < kUnit; i += kRows)
            multiply_rows(left + i * kUnit, right, units, out + i * ld, ld, first, piece);
    }

 private:
    static DOMERGE_INLINE void multiply_rows(const uint16_t* left, const uint16_t* right,
                                             int64_t units, float* out, int64_t ld, bool first,
                                             Piece& piece) {
        FloatVec sum[kRows][2] = {};
        for (int64_t u = 0; u < units; ++u, left += kUnitNumbers, right += kUnitNumbers) {
            piece.fetch(kLines);
            for (int64_t w = 0; w < kHalf; ++w) add_pairs(left + 2 * w, right + w * kUnit, sum);
        }
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                float* at = out + n * ld + v * kWidth;
                store(at, first ? sum[n][v] : load<FloatVec>(at) + sum[n][v]);
            }
        }
    }

    static DOMERGE_INLINE void add_pairs(const uint16_t* left, const uint16_t* right,
                                         FloatVec (&sum)[kRows][2]) {
        const BitsVec low = load<BitsVec>(right), high = load<BitsVec>(right + kSquareNumbers);
#pragma GCC unroll 8
        for (int n = 0; n < kRows; ++n) {
            const BitsVec pair = BitsVec{} + load<uint32_t>(left + n * kUnit);
            sum[n][0] = add_dot(sum[n][0], pair, low);
            sum[n][1] = add_dot(sum[n][1], pair, high);
        }
    }

    static DOMERGE_INLINE FloatVec add_dot(FloatVec sum, BitsVec left, BitsVec right) {
        return _mm512_dpbf16_ps(sum, bits<__m512bh>(left), bits<__m512bh>(right));
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
