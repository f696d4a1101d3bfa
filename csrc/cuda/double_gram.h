// X X^T of tiles of rows in float64, on the tensor cores that take float64 where there are such.
//
// An instruction multiplies 8 x 4 numbers by 4 x 8, or from sm_90 on 16 x 4 by 4 x 8 in the same
// time. Of eight rows of X lanes have the same numbers whether they are the left operand or the
// right one, and which columns go together is free, as long as all rows have the same ones: so
// blocks come from shared memory as 16-bit products take them (lines.h), each number becomes a
// double once, and serves all squares of 8 x 8 of its rows. Squares above the diagonal are left
// out. Warps share the columns, and their sums are added.
#pragma once

#include "lines.h"

namespace domerge {

// Sums of 8 x 8: lane 4 g + t has (g, 2 t), (g, 2 t + 1).
using Sums8x8 = Fragment<double, 2>;

// Numbers of eight rows: lane 4 g + t has row g of the t-th of four columns.
using Eight = Fragment<double, 1>;

// sums += left right^T.
DOMERGE_DEVICE void add_product(Sums8x8& sums, const Eight& left, const Eight& right) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(sums.values[0]), "+d"(sums.values[1])
        : "d"(left.values[0]), "d"(right.values[0]));
#else
    for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j)
            for (int k = 0; k < 4; ++k)
                sums.of(4 * i + j / 2)[j % 2] += left.of(4 * i + k)[0] * right.of(4 * j + k)[0];
#endif
}

// The same of sixteen rows of the left operand.
DOMERGE_DEVICE void add_products(Sums8x8& upper, Sums8x8& lower, const Eight& left,
                                 const Eight& below, const Eight& right) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm("mma.sync.aligned.m16n8k4.row.col.f64.f64.f64.f64 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+d"(upper.values[0]), "+d"(upper.values[1]), "+d"(lower.values[0]), "+d"(lower.values[1])
        : "d"(left.values[0]), "d"(below.values[0]), "d"(right.values[0]));
#else
    add_product(upper, left, right);
    add_product(lower, below, right);
#endif
}

template <class Format, int kSize, int kThreads>
struct DoubleGram {
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kEights = kSize / 8;
    static constexpr int kHalf = kEights / 2;              // of a tile beside the diagonal, across
    static constexpr int kRows = kSize < 16 ? 16 : kSize;  // in shared memory
    static constexpr int kVector = kLanes<Format>;
    static constexpr int kOperand = 512;  // Words
    static constexpr int kColumns = kOperand * kVector / kRows;
    static constexpr bool kAlone = kSize < 64;  // one tile, on the diagonal
    static constexpr int kStages = kAlone ? 6 : 3;
    static constexpr int kStage = (kAlone ? 1 : 2) * kOperand;
    static constexpr int kSquares = kEights * (kEights + 1) / 2;
    static_assert(kEights * kHalf <= kSquares);
    static constexpr int64_t kStagedBytes =
        kStages * kStage * sizeof(Words) + (kAlone ? 1 : 2) * kRows * 12;
    static constexpr int kSlot = kSquares * 64;  // sums of a warp, square by square
    static constexpr int64_t kSlotBytes = 2 * kSlot * sizeof(double);
    static constexpr int64_t kSharedBytes = kStagedBytes > kSlotBytes ? kStagedBytes : kSlotBytes;
    static_assert(kWarps == 4);  // see add_up

    struct Sums {
        Sums8x8 at[kSquares];
    };
    using WarpSums = PerWarp<Sums, kThreads>;

    // The square of eight rows i and eight rows j, of those that a warp has: at or below the
    // diagonal, or half of a tile beside it.
    template <bool kDiagonal>
    static DOMERGE_DEVICE int square(int i, int j) {
        return kDiagonal ? i * (i + 1) / 2 + j : i * kHalf + j;
    }
    template <bool kDiagonal>
    static constexpr int kOwn = kDiagonal ? kSquares : kEights * kHalf;

    // Warps that have the same squares, and share the columns.
    template <bool kDiagonal>
    static constexpr int kGroups = kDiagonal ? kWarps : kWarps / 2;

    // All squares of a warp, of four columns.
    template <bool kDiagonal, int kCount>
    static DOMERGE_DEVICE void add(Sums& sums, const Eight (&left)[kEights],
                                   const Eight (&right)[kCount]) {
        const auto at = [&](int i, int j) -> Sums8x8& { return sums.at[square<kDiagonal>(i, j)]; };
        DOMERGE_UNROLL
        for (int i = 0; i + 1 < kEights; i += 2) DOMERGE_UNROLL
        for (int j = 0; j < (kDiagonal ? i + 1 : kCount); ++j)
            add_products(at(i, j), at(i + 1, j), left[i], left[i + 1], right[j]);
        if constexpr (kDiagonal) {
            constexpr int kFirst = kEights > 1 ? 1 : 0;  // of eights without one below them
            DOMERGE_UNROLL
            for (int i = kFirst; i < kEights; i += 2) add_product(at(i, i), left[i], right[i]);
        }
    }

    template <bool kInColumns>
    struct Way {
        using Lines = domerge::Lines<Format, kInColumns, kRows, kColumns, kThreads>;
        static constexpr int kStep = Lines::kBlockColumns;
        static constexpr int kPerWord = kVector / 4;
        static constexpr int kFours = kStep / 4;  // columns of a block of 16 rows, four at a time

        template <int kCount>
        static DOMERGE_DEVICE void load(const typename Lines::Corner& from, int lane, int column,
                                        Left16x16 (&blocks)[kCount]) {
            DOMERGE_UNROLL
            for (int i = 0; i < kCount; ++i) Lines::load(from, lane, 16 * i, column, blocks[i]);
        }

        // Of each eight rows the numbers of four columns.
        template <int kBlocks, int kCount>
        static DOMERGE_DEVICE void convert(const Left16x16 (&blocks)[kBlocks], int four,
                                           Eight (&to)[kCount]) {
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int e = 0; e < kCount; ++e) {
                    const uint32_t word = blocks[e / 2].of(lane)[e % 2 + four / kPerWord * 2];
                    if constexpr (kPerWord == 1)
                        to[e].of(lane)[0] = from_bits(word);
                    else
                        to[e].of(lane)[0] =
                            Format::load(static_cast<uint16_t>(word >> four % kPerWord * 16));
                }
            });
        }

        // Both tiles are one on the diagonal. Beside it a warp has half of the right one's rows.
        template <bool kDiagonal>
        static DOMERGE_DEVICE void multiply(int warp, const Words* left, const Words* right,
                                            Sums& sums) {
            constexpr int groups = kGroups<kDiagonal>;
            const int lane = own_lane(), begin = warp % groups * kStep;
            const auto down = Lines::corner(left, 0, begin);
            const auto across = Lines::corner(right, warp / groups * 8 * kHalf, begin);
            DOMERGE_UNROLL
            for (int k = 0; k < kColumns; k += groups * kStep) {
                Left16x16 rows[kRows / 16], others[kDiagonal ? 1 : (kHalf + 1) / 2];
                load(down, lane, k, rows);
                if constexpr (!kDiagonal) load(across, lane, k, others);
                DOMERGE_UNROLL
                for (int four = 0; four < kFours; ++four) {
                    Eight of_left[kEights], of_right[kDiagonal ? 1 : kHalf];
                    convert(rows, four, of_left);
                    if constexpr (!kDiagonal) convert(others, four, of_right);
                    if constexpr (kDiagonal)
                        add<true>(sums, of_left, of_left);
                    else
                        add<false>(sums, of_left, of_right);
                }
            }
        }
    };

    // Rows [first, first + kSize) times those from `second` on, unscaled: afterwards the product is
    // in shared memory, for gather; of it the lower triangle where first is second.
    static DOMERGE_DEVICE void run(Block<kThreads>& block, const Reader<Format>& x, int first,
                                   int second) {
        if (kAlone || first == second)
            multiply<true>(block, x, first, second);
        else if constexpr (!kAlone)
            multiply<false>(block, x, first, second);
    }

    template <bool kDiagonal>
    static DOMERGE_DEVICE void multiply(Block<kThreads>& block, const Reader<Format>& x, int first,
                                        int second) {
        WarpSums sums;
        block.warps([&](int warp) {
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int i = 0; i < kOwn<kDiagonal>; ++i)
                    sums[warp].at[i].of(lane)[0] = sums[warp].at[i].of(lane)[1] = 0.0;
            });
        });
        if (x.columns)
            add_all<true, kDiagonal>(block, x, first, second, sums);
        else
            add_all<false, kDiagonal>(block, x, first, second, sums);
        add_up<kDiagonal>(block, sums);
    }

    template <bool kInColumns, bool kDiagonal>
    static DOMERGE_DEVICE void add_all(Block<kThreads>& block, const Reader<Format>& x, int first,
                                       int second, WarpSums& sums) {
        using Way = typename DoubleGram::template Way<kInColumns>;
        using Sources = typename Way::Lines::Sources;
        Words* const shared = reinterpret_cast<Words*>(block.shared);
        Sources* const sources = reinterpret_cast<Sources*>(shared + kStages * kStage);
        constexpr int kOperands = kDiagonal ? 1 : 2;
        Copies<kThreads> copies;
        block.each([&](int thread) {
            for (int i = 0; i < kOperands; ++i)
                Way::Lines::locate(thread, x, i == 0 ? first : second, sources[i]);
        });
        const int chunks = (x.end + kColumns - 1) / kColumns;
        for (int chunk = 1 - kStages; chunk < chunks; ++chunk) {
            const int coming = chunk + kStages - 1;
            Words* const to = shared + coming % kStages * kStage;
            const Words* const left = shared + (chunk + kStages) % kStages * kStage;
            block.warps([&](int warp) {
                lanes([&](int lane) {
                    const int thread = warp * kLanesOfWarp + lane;
                    if (coming < chunks) {
                        DOMERGE_ROLLED
                        for (int i = 0; i < kOperands; ++i)
                            Way::Lines::start(copies, thread, to + i * kOperand, x, sources[i],
                                              i == 0 ? first : second, coming * kColumns);
                    }
                    copies.commit(thread);
                });
                if (chunk >= 0)
                    Way::template multiply<kDiagonal>(opaque(warp), left, left + kOperand,
                                                      sums[warp]);
                lanes([&](int lane) {
                    copies.template wait<kStages - 2>(warp * kLanesOfWarp + lane);
                });
            });
        }
        block.each([&](int thread) { copies.template wait<0>(thread); });
    }

    // A warp's sums to a slot of shared memory, or those of a slot added to them.
    template <bool kDiagonal>
    static DOMERGE_DEVICE void put(const Sums& sums, double* slot) {
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int i = 0; i < kOwn<kDiagonal>; ++i) {
                const auto& from = sums.at[i].of(lane);
                vector_at<Pair>(slot + 64 * i + 2 * lane) = {from[0], from[1]};
            }
        });
    }
    template <bool kDiagonal>
    static DOMERGE_DEVICE void take(Sums& sums, double* slot) {
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int i = 0; i < kOwn<kDiagonal>; ++i) {
                const Pair other = vector_at<Pair>(slot + 64 * i + 2 * lane);
                sums.at[i].of(lane)[0] += other.at[0];
                sums.at[i].of(lane)[1] += other.at[1];
            }
        });
    }
    using Pair = Vector<double, 2>;

    // Upper groups to lower ones, until the first has all: of each half of a tile beside the
    // diagonal, which has a slot of its own.
    template <bool kDiagonal>
    static DOMERGE_DEVICE void add_up(Block<kThreads>& block, WarpSums& sums) {
        double* const slots = reinterpret_cast<double*>(block.shared);
        const auto slot = [&](int warp) {
            return slots + (kDiagonal ? warp % 2 : warp / 2) * kSlot;
        };
        constexpr int kLast = kGroups<kDiagonal> / 2;
        block.warps([&](int warp) {
            if (warp % kGroups<kDiagonal> >= kLast) put<kDiagonal>(sums[warp], slot(warp));
        });
        block.warps([&](int warp) {
            if (warp % kGroups<kDiagonal> >= kLast) return;
            take<kDiagonal>(sums[warp], slot(warp));
            if (!kDiagonal || warp == 1) put<kDiagonal>(sums[warp], slot(warp));
        });
        if constexpr (kDiagonal)
            block.warps([&](int warp) {
                if (warp != 0) return;
                take<true>(sums[0], slots + kSlot);
                put<true>(sums[0], slots);
            });
    }

    // One entry of the product. diagonal: whether its tiles were one.
    static DOMERGE_DEVICE double gather(const double* product, bool diagonal, int row, int column) {
        const int i = row / 8, j = column / 8, inside = row % 8 * 8 + column % 8;
        if (kAlone || diagonal) return product[64 * square<true>(i, j) + inside];
        constexpr int half = kHalf > 0 ? kHalf : 1;
        return product[j / half * kSlot + 64 * square<false>(i, j % half) + inside];
    }
};

}  // namespace domerge
