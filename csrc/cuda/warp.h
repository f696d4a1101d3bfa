// What a warp does as one: products of 16-bit matrices on tensor cores, and their operands' way
// from shared memory to registers. On the host each is a loop over the lanes, by the layouts that
// PTX documents for mma.m16n8k16 and ldmatrix.
#pragma once

#include "table.h"
#ifndef __CUDACC__
#include <utility>
#endif

namespace domerge {

constexpr int kLanesOfWarp = 32;

#ifdef __CUDACC__

// kCount T of every lane.
template <class T, int kCount>
struct Fragment {
    T values[kCount];
    DOMERGE_DEVICE T (&of(int)) [kCount] { return values; } DOMERGE_DEVICE const
        T (&of(int) const)[kCount] {
        return values;
    }
};

// visit(lane): nothing that one lane does may depend on another.
template <class Visit>
DOMERGE_DEVICE void lanes(Visit visit) {
    visit(static_cast<int>(threadIdx.x % kLanesOfWarp));
}

// The lanes wait for each other, and have what each wrote to memory: before what all do together.
DOMERGE_DEVICE void converge() {
    __syncwarp();
}

// The lane, for addresses: what is derived from it is not kept in registers for the next phase.
DOMERGE_DEVICE int own_lane() {
    converge();
    return opaque(static_cast<int>(threadIdx.x % kLanesOfWarp));
}

// visit(lane) of the lanes, lane: own_lane().
template <class Visit>
DOMERGE_DEVICE void lanes_from(int lane, Visit visit) {
    visit(lane);
}

#else

inline void converge() {}

inline int own_lane() {
    return 0;  // what loads blocks goes through all
}

template <class T, int kCount>
struct Fragment {
    T values[kLanesOfWarp][kCount];
    T (&of(int lane)) [kCount] { return values[lane]; } const T (&of(int lane) const)[kCount] {
        return values[lane];
    }
};

template <class Visit>
void lanes(Visit visit) {
    in_order(kLanesOfWarp, [&](int64_t lane) { visit(static_cast<int>(lane)); });
}

template <class Visit>
void lanes_from(int, Visit visit) {
    lanes(visit);
}

#endif

// Sums of 16 x 8: lane 4 g + t has (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
using Sums16x8 = Fragment<float, 4>;

// Elements of 16 x 16, two a word, the first in the lower half: lane 4 g + t has (g, 2 t),
// (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8), each with the element to its right.
struct Left16x16 : Fragment<uint32_t, 4> {
    static constexpr bool kIsLeft = true;
};

// The same as two times eight rows, one after the other: (g, 2 t), (g, 2 t + 8), (g + 8, 2 t),
// (g + 8, 2 t + 8). An instruction takes those of eight rows from neighbouring registers.
struct Right16x16 : Fragment<uint32_t, 4> {
    static constexpr bool kIsLeft = false;
};

DOMERGE_DEVICE void clear(Sums16x8& sums) {
    lanes([&](int lane) {
        DOMERGE_UNROLL
        for (int i = 0; i < 4; ++i) sums.of(lane)[i] = 0.0f;
    });
}

DOMERGE_DEVICE void add(Sums16x8& to, const Sums16x8& from) {
    lanes([&](int lane) {
        DOMERGE_UNROLL
        for (int i = 0; i < 4; ++i) to.of(lane)[i] += from.of(lane)[i];
    });
}

// Transposes the 4 x 4 words of every four lanes: lane t gets the t-th words.
DOMERGE_DEVICE void transpose_quads(Fragment<uint32_t, 4>& words) {
#ifdef __CUDACC__
    const int lane = threadIdx.x % kLanesOfWarp;
    auto& w = words.values;
    const auto exchange = [&](uint32_t& first, uint32_t& second, int distance) {
        const bool upper = (lane & distance) != 0;
        const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? first : second, distance);
        (upper ? first : second) = other;
    };
    exchange(w[0], w[1], 1);
    exchange(w[2], w[3], 1);
    exchange(w[0], w[2], 2);
    exchange(w[1], w[3], 2);
#else
    for (int lane = 0; lane < kLanesOfWarp; lane += 4)
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < i; ++j) std::swap(words.of(lane + i)[j], words.of(lane + j)[i]);
#endif
}

// Adds up what every four lanes have: each gets the sums.
template <int kCount>
DOMERGE_DEVICE void add_quads(Fragment<float, kCount>& numbers) {
    DOMERGE_UNROLL
    for (int i = 0; i < kCount; ++i) {
#ifdef __CUDACC__
        float& number = numbers.values[i];
        number += __shfl_xor_sync(0xffffffffu, number, 1);
        number += __shfl_xor_sync(0xffffffffu, number, 2);
#else
        for (int lane = 0; lane < kLanesOfWarp; lane += 4) {
            const auto of = [&](int k) -> float& { return numbers.of(lane + k)[i]; };
            const float sum = (of(0) + of(1)) + (of(2) + of(3));
            for (int k = 0; k < 4; ++k) of(k) = sum;
        }
#endif
    }
}

#ifndef __CUDACC__

// How a tensor core of the host adds: -1 rounds the exact sum to nearest; otherwise eight products
// and the sum so far are cut to the last place of the largest of them and so many bits more, added,
// and cut to 24 bits, all towards zero.
inline int extra_bits = -1;

inline double cut(double value, int exponent) {
    return std::ldexp(std::trunc(std::ldexp(value, -exponent)), exponent);
}

template <int kCount>
float sum_of_products(float before, const double (&products)[kCount]) {
    if (extra_bits < 0) {
        double sum = before;
        for (double product : products) sum += product;
        return static_cast<float>(sum);
    }
    double sum = before;
    for (int first = 0; first < kCount; first += 8) {
        double largest = std::abs(sum);
        for (int k = 0; k < 8; ++k) largest = std::fmax(largest, std::abs(products[first + k]));
        if (largest == 0.0 || !std::isfinite(largest)) {
            for (int k = 0; k < 8; ++k) sum += products[first + k];
            continue;
        }
        const int last = std::ilogb(largest) - 23 - extra_bits;
        double total = cut(sum, last);
        for (int k = 0; k < 8; ++k) total += cut(products[first + k], last);
        sum = total == 0.0 || !std::isfinite(total) ? total : cut(total, std::ilogb(total) - 23);
    }
    return static_cast<float>(sum);
}

// Which row and column of a block, in steps of eight, the i-th word of a lane is from.
template <class Block>
int down(int i) {
    return (Block::kIsLeft ? i % 2 : i / 2) * 8;
}
template <class Block>
int across(int i) {
    return (Block::kIsLeft ? i / 2 : i % 2) * 8;
}

// The element of a block that its lanes hold.
template <class Format, class Block>
float element(const Block& block, int row, int column) {
    const int i = Block::kIsLeft ? row / 8 + column / 8 * 2 : column / 8 + row / 8 * 2;
    const uint32_t word = block.of(row % 8 * 4 + column % 8 / 2)[i];
    return Format::load(static_cast<uint16_t>(word >> column % 2 * 16));
}

#endif

// sums += left right^T of the eight rows of `right` from 8 half on.
template <class Format>
DOMERGE_DEVICE void add_product(Sums16x8& sums, const Left16x16& left, const Right16x16& right,
                                int half) {
#ifdef __CUDACC__
#define DOMERGE_MMA(TYPE)                                                                        \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE                                   \
        ".f32 "                                                                                  \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
        : "+f"(sums.values[0]), "+f"(sums.values[1]), "+f"(sums.values[2]), "+f"(sums.values[3]) \
        : "r"(left.values[0]), "r"(left.values[1]), "r"(left.values[2]), "r"(left.values[3]),    \
          "r"(right.values[2 * half]), "r"(right.values[2 * half + 1]))
    if constexpr (std::is_same_v<Format, BFloat16>)
        DOMERGE_MMA("bf16");
    else
        DOMERGE_MMA("f16");
#undef DOMERGE_MMA
#else
    float a[16][16], b[8][16];
    for (int k = 0; k < 16; ++k) {
        for (int i = 0; i < 16; ++i) a[i][k] = element<Format>(left, i, k);
        for (int j = 0; j < 8; ++j) b[j][k] = element<Format>(right, 8 * half + j, k);
    }
    for (int i = 0; i < 16; ++i) {
        for (int j = 0; j < 8; ++j) {
            double products[16];
            for (int k = 0; k < 16; ++k) products[k] = double{a[i][k]} * b[j][k];
            float& sum = sums.of(i % 8 * 4 + j / 2)[i / 8 * 2 + j % 2];
            sum = sum_of_products(sum, products);
        }
    }
#endif
}

// A tile of 16-bit elements in shared memory, kUnits vectors of eight a line, which lie so that
// eight lines' vectors of one position, and all of a line, are in different banks.
template <int kUnits>
struct Swizzled {
    static_assert((kUnits & (kUnits - 1)) == 0);
    static constexpr int kShift = kUnits >= 8 ? 0 : kUnits == 4 ? 1 : kUnits == 2 ? 2 : 3;
    static constexpr int kMask = (kUnits < 8 ? kUnits : 8) - 1;

    static DOMERGE_DEVICE int place(int line, int unit) {
        return line * kUnits + (unit ^ (line >> kShift & kMask));
    }
    static DOMERGE_DEVICE Words* at(Words* tile, int line, int unit) {
        return tile + place(line, unit);
    }

    // Where a warp's part of a matrix in a tile begins, at a row and a column that are multiples of
    // 16; lines are the matrix's rows, or its columns where kAcross.
    struct Corner {
        const Words* line;
        int unit;
    };
    template <bool kAcross>
    static DOMERGE_DEVICE Corner corner(const Words* tile, int row, int column) {
        return {tile + (kAcross ? column : row) * kUnits, (kAcross ? row : column) >> 3};
    }

    // 16 rows and columns from `row` and `column` of the part on, multiples of 16; what runs along
    // the lines is less than a power of two that the part's beginning is a multiple of, so that
    // units have no bits in common. lane: own_lane(). Constants come last: the compiler then has
    // them in the instructions.
    template <bool kAcross, class Block>
    static DOMERGE_DEVICE void load(const Corner& corner, int lane, int row, int column,
                                    Block& block) {
        const int line = kAcross ? column : row, unit = (kAcross ? row : column) >> 3;
#ifdef __CUDACC__
        const int own = kAcross == Block::kIsLeft
                            ? place((lane & 7) + (lane >> 4) * 8, lane >> 3 & 1)
                            : place(lane & 15, lane >> 4);
        const auto begin = static_cast<uint32_t>(__cvta_generic_to_shared(corner.line));
        const uint32_t address = begin + 16u * (own ^ corner.unit ^ unit) + 16u * kUnits * line;
        auto& to = block.values;
#define DOMERGE_LDMATRIX(TRANSPOSED)                                  \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANSPOSED           \
                 ".shared.b16 "                                       \
                 "{%0, %1, %2, %3}, [%4];"                            \
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) \
                 : "r"(address)                                       \
                 : "memory")
        if constexpr (kAcross)
            DOMERGE_LDMATRIX(".trans");
        else
            DOMERGE_LDMATRIX("");
#undef DOMERGE_LDMATRIX
#else
        for (; lane < kLanesOfWarp; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const int down = domerge::down<Block>(i) + lane / 4;
                const int across = domerge::across<Block>(i) + lane % 4 * 2;
                const auto get = [&](int next) {
                    const int l = line + (kAcross ? across + next : down);
                    const int position = kAcross ? down : across + next;
                    const Words& from = corner.line[place(l, (corner.unit ^ unit) + position / 8)];
                    return from.at[position % 8 / 2] >> position % 2 * 16 & 0xffffu;
                };
                block.of(lane)[i] = get(0) | get(1) << 16;
            }
        }
#endif
    }
};

}  // namespace domerge
