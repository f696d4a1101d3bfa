// Philox4x32-10. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

// Four words of each lane's counter, in the lower halves; what the upper halves hold is arbitrary.
struct Words {
    WideVec x0, x1, x2, x3;
};

DOMERGE_INLINE Words philox(Words x, uint32_t key0, uint32_t key1) {
    const WideVec factor0 = WideVec{} + 0xd2511f53u, factor1 = WideVec{} + 0xcd9e8d57u;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const WideVec product0 = multiply_low(factor0, x.x0);
        const WideVec product1 = multiply_low(factor1, x.x2);
        x.x0 = (product1 >> 32) ^ x.x1 ^ key0;
        x.x1 = product1;
        x.x2 = (product0 >> 32) ^ x.x3 ^ key1;
        x.x3 = product0;
        key0 += 0x9e3779b9u;
        key1 += 0xbb67ae85u;
    }
    return x;
}

// Lane 4 g + j of (low, high) is word j of lane g.
template <int Half, int... L>
DOMERGE_INLINE BitsVec interleave(BitsVec x01, BitsVec x23, std::integer_sequence<int, L...>) {
    return DOMERGE_SHUFFLE(x01, x23,
                           ((L & 2) * kWidth / 2 + Half * kWidth / 2 + L / 4 * 2 + L % 2)...);
}

// words [n, and up to kPanel more] of columns [column, column + n) of a row; column is a multiple
// of four.
inline void draw_words(const Draw& draw, int64_t row, int64_t column, int64_t n, uint32_t* words) {
    constexpr int64_t step = 2 * kWidth;
    constexpr auto lanes = std::make_integer_sequence<int, kWidth>{};
    WideVec group = WideVec{} + static_cast<uint64_t>(column / 4);
    for (int i = 0; i < kWidth / 2; ++i) group[i] += i;
    const WideVec zero{};
    for (int64_t c = 0; c < n; c += step, group += kWidth / 2) {
        const Words x = philox(Words{group, zero + static_cast<uint64_t>(row), zero + draw.adapter,
                                     zero + draw.module},
                               draw.key[0], draw.key[1]);
        const BitsVec x01 = bits<BitsVec>((x.x0 & 0xffffffffu) | (x.x1 << 32));
        const BitsVec x23 = bits<BitsVec>((x.x2 & 0xffffffffu) | (x.x3 << 32));
        store(words + c, interleave<0>(x01, x23, lanes));
        store(words + c + kWidth, interleave<1>(x01, x23, lanes));
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
