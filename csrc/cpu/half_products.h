// Products of bfloat16 panels: a unit is two squares of 16 x 16 words, each two neighbours along
// the sum. The left operand's squares are [16 rows, 16 words], the right one's [16 words, 16
// columns].
#pragma once

#include "factor_kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kHalf = kUnit / 2;
constexpr int64_t kSquareNumbers = kUnitNumbers / 2;
static_assert(kWidth == kHalf, "a row of a square is a vector");

// Rounded to bfloat16, in the upper half of every word.
DOMERGE_INLINE BitsVec rounded(FloatVec v) {
    const BitsVec b = bits<BitsVec>(v);
    return (b + 0x7fffu + ((b >> 16) & 1u)) & 0xffff0000u;
}

struct HalfPanels {
    using Format = BFloat16;
    using Number = uint16_t;
    static constexpr double kNoise = 0x1p-20;
    static constexpr int64_t kEstimated = 1024;
    static constexpr int64_t kPanels = 2;
    static constexpr int64_t kBlockRows = 8;
    static constexpr int64_t kBlockColumns = 16;
    static constexpr int64_t kStretch = 8;  // units of which both operands' panels stay in L1

    static DOMERGE_INLINE FloatVec leading(FloatVec v) { return bits<FloatVec>(rounded(v)); }

    static void pack_right(const float* block, uint16_t* right) {
        for (int64_t t = 0; t < 2; ++t) {
            for (int64_t w = 0; w < kHalf; ++w) {
                const float* at = block + 2 * w * kUnit + t * kHalf;
                const BitsVec even = rounded(load<FloatVec>(at));
                const BitsVec odd = rounded(load<FloatVec>(at + kUnit));
                store(right + t * kSquareNumbers + w * kUnit, even >> 16 | odd);
            }
        }
    }
    static void pack_both(const float* block, uint16_t* left, uint16_t* right) {
        for (int64_t t = 0; t < 2; ++t) {
            FloatVec square[kWidth];
#pragma GCC unroll 16
            for (int w = 0; w < kWidth; ++w) {
                const float* at = block + 2 * w * kUnit + t * kHalf;
                const BitsVec even = rounded(load<FloatVec>(at));
                const BitsVec odd = rounded(load<FloatVec>(at + kUnit));
                square[w] = bits<FloatVec>(even >> 16 | odd);
                store(right + t * kSquareNumbers + w * kUnit, square[w]);
            }
            transpose_square(square);
#pragma GCC unroll 16
            for (int w = 0; w < kWidth; ++w)
                store(left + t * kSquareNumbers + w * kUnit, square[w]);
        }
    }
    static void pack_left(const float* block, uint16_t* left) {
        alignas(64) uint16_t right[kUnitNumbers];
        pack_both(block, left, right);
    }
    static void pack_rows(const float* block, uint16_t* left) {
        for (int64_t i = 0; i < kUnit; ++i)
            for (int64_t k = 0; k < kUnit; k += kWidth)
                BFloat16::store(left + i * kUnit + k, load<FloatVec>(block + i * kUnit + k));
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
