// Products of float32 on tensor cores, which take the 11 leading bits of a number, TF32. A number
// is split into two such parts; of their four products that of the lower parts, at most 2^-22 of
// the whole, is left out.
#pragma once

#include "warp.h"

namespace domerge {

// The nearest number of TF32; of NaN it may be any, as the lower part is NaN then.
DOMERGE_DEVICE float to_tf32(float x) {
    return from_bits((to_bits(x) + 0x1000u) & ~0x1fffu);
}

// Numbers in two parts. Of 16 x 8 lane 4 g + t has (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);
// of 8 x 8 it has (g, t), (g, t + 4).
template <int kCount>
struct Parts {
    Fragment<float, kCount> high;
    Fragment<float, kCount> low;

    DOMERGE_DEVICE void put(int lane, int i, float number) {
        high.of(lane)[i] = to_tf32(number);
        low.of(lane)[i] = number - high.of(lane)[i];
    }
};

// sums += left right^T, left 16 x 8, and right 8 x 8 or eight rows of 16 x 8, from 8 half on; both
// cut to TF32.
template <int kCount>
DOMERGE_DEVICE void add_product(Sums16x8& sums, const Fragment<float, 4>& left,
                                const Fragment<float, kCount>& right, int half) {
    constexpr int kNext = kCount / 2;
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3])
        : "r"(to_bits(left.values[0])), "r"(to_bits(left.values[1])), "r"(to_bits(left.values[2])),
          "r"(to_bits(left.values[3])), "r"(to_bits(right.values[half])),
          "r"(to_bits(right.values[half + kNext])));
#else
    const auto cut = [](float x) { return double{from_bits(to_bits(x) & ~0x1fffu)}; };
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            double products[8];
            for (int k = 0; k < 8; ++k)
                products[k] = cut(left.of(i % 8 * 4 + k % 4)[i / 8 + k / 4 * 2]) *
                              cut(right.of(j * 4 + k % 4)[half + k / 4 * kNext]);
            float& sum = sums.of(i % 8 * 4 + j / 2)[i / 8 * 2 + j % 2];
            sum = sum_of_products(sum, products);
        }
    }
#endif
}

template <int kCount>
DOMERGE_DEVICE void add_product(Sums16x8& sums, const Parts<4>& left, const Parts<kCount>& right,
                                int half = 0) {
    add_product(sums, left.low, right.high, half);
    add_product(sums, left.high, right.low, half);
    add_product(sums, left.high, right.high, half);
}

// A tile of float32 in shared memory, kUnits vectors of four a line, of which a line is a column of
// the matrix: they lie so that what the lanes read of a block is in different banks.
template <int kUnits>
struct SwizzledColumns {
    static_assert(kUnits >= 4 && (kUnits & (kUnits - 1)) == 0);

    // Two units of every eight change places with others, or of four where a line has no more.
    static DOMERGE_DEVICE int pair(int line, int pair) {
        return kUnits == 4 ? pair ^ (line / 2 % 2) : pair ^ (line % 4);
    }
    static DOMERGE_DEVICE Words* at(Words* tile, int line, int unit) {
        return tile + line * kUnits + unit / 8 * 8 + 2 * pair(line, unit / 2 % 4) + unit % 2;
    }

    // Rows from a multiple of 16 and columns from one of 8 on, as Swizzled::load has them in rows.
    // lane: own_lane().
    static DOMERGE_DEVICE void load(const Words* tile, int lane, int row, int column,
                                    Fragment<uint32_t, 4>& block) {
        const auto words = reinterpret_cast<const uint32_t*>(tile + column * kUnits + row / 32 * 8);
        lanes_from(lane, [&](int own) {
            DOMERGE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int line = own % 4 + i / 2 * 4, from = row / 16 % 2 * 2 + i % 2;
                block.of(own)[i] = words[4 * kUnits * line + 8 * pair(line, from) + own / 4];
            }
        });
    }
};

}  // namespace domerge
