// Products of float32 on tensor cores, which take the 11 leading bits of a number, TF32. A number
// is cut into two such parts, without its last two bits at most, 2^-21 of it; of their four
// products that of the lower parts, at most 2^-20 of the whole, is left out.
#pragma once

#include "warp.h"

namespace domerge {

// What a tensor core sees of a number; of NaN it may be any, as the lower part is NaN then.
DOMERGE_DEVICE float cut_to_tf32(float x) {
    return from_bits(to_bits(x) & ~0x1fffu);
}

// Numbers in two parts, the higher of which is the number itself, as a tensor core cuts it.
// Of 16 x 8 lane 4 g + t has (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); of 8 x 8 it has
// (g, t), (g, t + 4), and of two times 8 x 8 one after the other.
template <int kCount>
struct Parts {
    Fragment<float, kCount> high;
    Fragment<float, kCount> low;

    DOMERGE_DEVICE void put(int lane, int i, float number) {
        high.of(lane)[i] = number;
        low.of(lane)[i] = number - cut_to_tf32(number);
    }
    DOMERGE_DEVICE void put(const Fragment<uint32_t, kCount>& words) {
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int i = 0; i < kCount; ++i) put(lane, i, from_bits(words.of(lane)[i]));
        });
    }
};

// sums += left right^T, left 16 x 8, and right 8 x 8, or that number `half` of two; both cut to
// TF32.
template <int kCount>
DOMERGE_DEVICE void add_product(Sums16x8& sums, const Fragment<float, 4>& left,
                                const Fragment<float, kCount>& right, int half) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3])
        : "r"(to_bits(left.values[0])), "r"(to_bits(left.values[1])), "r"(to_bits(left.values[2])),
          "r"(to_bits(left.values[3])), "r"(to_bits(right.values[2 * half])),
          "r"(to_bits(right.values[2 * half + 1])));
#else
    const auto cut = [](float x) { return double{cut_to_tf32(x)}; };
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            double products[8];
            for (int k = 0; k < 8; ++k)
                products[k] = cut(left.of(i % 8 * 4 + k % 4)[i / 8 + k / 4 * 2]) *
                              cut(right.of(j * 4 + k % 4)[2 * half + k / 4]);
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
        return kUnits == 4 ? pair ^ (line >> 1 & 1) : pair ^ (line & 3);
    }
    static DOMERGE_DEVICE Words* at(Words* tile, int line, int unit) {
        return tile + line * kUnits + unit / 8 * 8 + 2 * pair(line, unit / 2 % 4) + unit % 2;
    }

    // As in Swizzled, of rows from a multiple of 32 on.
    struct Corner {
        const uint32_t* words;
    };
    static DOMERGE_DEVICE Corner corner(const Words* tile, int row, int column) {
        return {reinterpret_cast<const uint32_t*>(tile + column * kUnits + (row >> 5) * 8)};
    }

    // 16 rows from a multiple of 16 and 8 columns from one of 8 of the part on. lane: own_lane().
    template <class Block>
    static DOMERGE_DEVICE void load(const Corner& corner, int lane, int row, int column,
                                    Block& block) {
        const auto words = corner.words + column * 4 * kUnits + (row >> 5) * 32;
        lanes_from(lane, [&](int own) {
            DOMERGE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int down = Block::kIsLeft ? i % 2 : i / 2;
                const int across = Block::kIsLeft ? i / 2 : i % 2;
                const int line = (own & 3) + across * 4, from = (row >> 4 & 1) * 2 + down;
                block.of(own)[i] = words[4 * kUnits * line + 8 * pair(line, from) + (own >> 2)];
            }
        });
    }
};

}  // namespace domerge
