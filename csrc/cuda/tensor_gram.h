// X X^T of a tile of rows on tensor cores: of 16-bit elements, or of float32 in parts of TF32.
//
// A warp has squares of 32 x 32, in tiles of 128 two of them one below the other: what it loads,
// and splits in parts, serves many products. In a tile on the diagonal squares above it are left
// out, and the warps of each scheduler have two or three of the others. Small tiles have groups of
// warps, which share the columns. A tensor core cuts off what it adds, so that long sums would come
// out small: after kChain columns they are added, rounded to nearest, to others.
#pragma once

#include "lines.h"
#include "tile.h"

namespace domerge {

template <class Format, int kSize>
struct TensorGram {
    static constexpr bool kInParts = sizeof(typename Format::Storage) == 4;
    static constexpr int kVector = kLanes<Format>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kSquare = least_of(kSize, 32);
    static constexpr int kSquares = kSize < 128 ? 1 : 2;  // of a warp
    static constexpr int kBlocks = kSquare / 16;          // of 16 x 16, down and across a square
    static constexpr int kAcross = kSize / kSquare;       // warps
    static constexpr int kPlaces = kAcross * kAcross / kSquares;
    static constexpr int kGroups = kWarps / kPlaces;
    static constexpr bool kOne = kSize == kSquare;  // square, on the diagonal
    // Columns at a time.
    static constexpr int kColumns = (kSize <= 16 ? 32 : kSize <= 32 ? 16 : 8) * kVector;
    static constexpr int kOwn = kColumns / kGroups;     // columns of a group
    static constexpr int kChain = kInParts ? 32 : 128;  // in parts, each is added three times
    static constexpr int kChunks = kChain / kOwn;
    // Tiles of less than the largest size are of problems of one tile: on the diagonal.
    static constexpr bool kAlone = kSize < 128;
    static constexpr int kStages = kAlone ? 4 : 3;
    static constexpr int kOperand = kSize * kColumns / kVector;  // Words
    static constexpr int kStage = (kAlone ? 1 : 2) * kOperand;
    static constexpr int kSpread = kGroups * kSize * (kSize + 4);
    static constexpr int64_t kStagedBytes =
        kStages * kStage * sizeof(Words) + (kAlone ? 1 : 2) * kSize * 12;
    static constexpr int64_t kSpreadBytes = kSpread * sizeof(float);
    static constexpr int64_t kSharedBytes =
        kStagedBytes > kSpreadBytes ? kStagedBytes : kSpreadBytes;
    static_assert(kGroups * kPlaces == kWarps && kChain % kOwn == 0);

    struct Sums {
        Sums16x8 at[kSquares][kBlocks][kBlocks][2];
    };

    // visit(square, i, j, half) of all sums.
    template <class Visit>
    static DOMERGE_DEVICE void each(Visit visit) {
        DOMERGE_UNROLL
        for (int square = 0; square < kSquares; ++square) DOMERGE_UNROLL
        for (int i = 0; i < kBlocks; ++i) DOMERGE_UNROLL
        for (int j = 0; j < kBlocks; ++j) DOMERGE_UNROLL
        for (int half = 0; half < 2; ++half) visit(square, i, j, half);
    }

    // Where a warp's squares are. Warps w and w + 4 are of one scheduler: of the places of a tile
    // of 128, which are numbered row by row, it has one with two squares at or below the diagonal,
    // and one with one or none.
    static DOMERGE_DEVICE int group(int warp) {
        return kGroups == 1 ? 0 : static_cast<unsigned>(warp) / kPlaces;
    }
    static DOMERGE_DEVICE unsigned place(int warp) {
        return kPlaces == 8 ? 0x32710654u >> 4 * warp & 7 : static_cast<unsigned>(warp) % kPlaces;
    }
    static DOMERGE_DEVICE int row(int warp) {
        return static_cast<int>(place(warp) / kAcross * (kSquares * kSquare));
    }
    static DOMERGE_DEVICE int column(int warp) {
        return static_cast<int>(place(warp) % kAcross * kSquare);
    }

    template <bool kInColumns>
    struct Way {
        using Lines = domerge::Lines<Format, kInColumns, kSize, kColumns, kThreads>;
        static constexpr int kStep = Lines::kBlockColumns;
        static_assert(kOwn % kStep == 0);

        template <class Block>
        using Operand = std::conditional_t<kInParts, Parts<4>, Block>;

        template <class Block>
        static DOMERGE_DEVICE void load(const typename Lines::Corner& corner, int lane, int row,
                                        int column, Operand<Block>& to) {
            if constexpr (kInParts) {
                Block words;
                Lines::load(corner, lane, row, column, words);
                to.put(words);
            } else {
                Lines::load(corner, lane, row, column, to);
            }
        }

        // The squares of a warp, without the first kFirst.
        template <int kFirst>
        static DOMERGE_DEVICE void multiply_from(int warp, const Words* left, const Words* right,
                                                 Sums& sums) {
            const int lane = own_lane(), begin = group(warp) * kOwn;
            const auto down = Lines::corner(left, row(warp), begin);
            const auto across = Lines::corner(right, column(warp), begin);
            DOMERGE_UNROLL
            for (int k = 0; k < kOwn; k += kStep) {
                Operand<Right16x16> columns[kBlocks];
                DOMERGE_UNROLL
                for (int j = 0; j < kBlocks; ++j)
                    load<Right16x16>(across, lane, 16 * j, k, columns[j]);
                DOMERGE_UNROLL
                for (int square = kFirst; square < kSquares; ++square) {
                    Operand<Left16x16> rows[kBlocks];
                    DOMERGE_UNROLL
                    for (int i = 0; i < kBlocks; ++i)
                        load<Left16x16>(down, lane, kSquare * square + 16 * i, k, rows[i]);
                    DOMERGE_UNROLL
                    for (int i = 0; i < kBlocks; ++i) DOMERGE_UNROLL
                    for (int j = 0; j < (kOne ? i + 1 : kBlocks); ++j) DOMERGE_UNROLL
                    for (int half = 0; half < 2; ++half)
                        add(sums.at[square][i][j][half], rows[i], columns[j], half);
                }
            }
        }

        static DOMERGE_DEVICE void multiply(int warp, const Words* left, const Words* right,
                                            bool diagonal, Sums& sums) {
            const int above = diagonal ? (column(warp) - row(warp)) / kSquare : 0;  // squares
            if (above <= 0)
                multiply_from<0>(warp, left, right, sums);
            else if (kSquares == 2 && above == 1)
                multiply_from<kSquares - 1>(warp, left, right, sums);
        }

        static DOMERGE_DEVICE void add(Sums16x8& sums, const Operand<Left16x16>& left,
                                       const Operand<Right16x16>& right, int half) {
            if constexpr (kInParts)
                add_product(sums, left, right, half);
            else
                add_product<Format>(sums, left, right, half);
        }
    };

    static DOMERGE_DEVICE void clear(Sums& sums) {
        each([&](int square, int i, int j, int half) {
            domerge::clear(sums.at[square][i][j][half]);
        });
    }

    static DOMERGE_DEVICE void move(Sums& from, Sums& to) {
        each([&](int square, int i, int j, int half) {
            add(to.at[square][i][j][half], from.at[square][i][j][half]);
            domerge::clear(from.at[square][i][j][half]);
        });
    }

    // Rows [first, first + kSize) times those from `second` on, columns from `begin` to x.end.
    // Unscaled. Afterwards the product, or its lower triangle where first is second, is in shared
    // memory, for gather.
    static DOMERGE_DEVICE void run(Block<kThreads>& block, const Reader<Format>& x, int first,
                                   int second, int begin) {
        PerWarp<Sums, kThreads> sums, totals;
        if (x.columns)
            add_all<true>(block, x, first, second, begin, sums, totals);
        else
            add_all<false>(block, x, first, second, begin, sums, totals);
        float* const spread = reinterpret_cast<float*>(block.shared);
        block.warps([&](int warp) {
            const Sums& found = totals[warp];
            const int line = group(warp) * kSize + row(warp);
            lanes([&](int lane) {
                each([&](int square, int i, int j, int half) {
                    const auto& from = found.at[square][i][j][half].of(lane);
                    const int down = line + kSquare * square + 16 * i + lane / 4;
                    float* const to = spread + down * (kSize + 4) + column(warp) + 16 * j +
                                      8 * half + lane % 4 * 2;
                    DOMERGE_UNROLL
                    for (int l = 0; l < 4; ++l) to[l / 2 * 8 * (kSize + 4) + l % 2] = from[l];
                });
            });
        });
    }

    template <bool kInColumns>
    static DOMERGE_DEVICE void add_all(Block<kThreads>& block, const Reader<Format>& x, int first,
                                       int second, int begin, PerWarp<Sums, kThreads>& sums,
                                       PerWarp<Sums, kThreads>& totals) {
        using Way = typename TensorGram::template Way<kInColumns>;
        using Sources = typename Way::Lines::Sources;
        Words* const shared = reinterpret_cast<Words*>(block.shared);
        Sources* const sources = reinterpret_cast<Sources*>(shared + kStages * kStage);
        const bool diagonal = kAlone || first == second;
        const int operands = diagonal ? 1 : 2;
        Copies<kThreads> copies;
        block.each([&](int thread) {
            for (int i = 0; i < operands; ++i)
                Way::Lines::locate(thread, x, i == 0 ? first : second, sources[i]);
        });
        block.warps([&](int warp) {
            clear(sums[warp]);
            clear(totals[warp]);
        });
        const int chunks = (x.end - begin + kColumns - 1) / kColumns;
        for (int chunk = 1 - kStages; chunk < chunks; ++chunk) {
            const int coming = chunk + kStages - 1;
            Words* const to = shared + coming % kStages * kStage;
            const Words* const left = shared + (chunk + kStages) % kStages * kStage;
            const Words* const right = diagonal ? left : left + kOperand;
            block.warps([&](int warp) {
                lanes([&](int lane) {
                    const int thread = warp * kLanesOfWarp + lane;
                    if (coming < chunks) {
                        DOMERGE_ROLLED
                        for (int i = 0; i < operands; ++i)
                            Way::Lines::start(copies, thread, to + i * kOperand, x, sources[i],
                                              i == 0 ? first : second, begin + coming * kColumns);
                    }
                    copies.commit(thread);
                });
                if (chunk >= 0) {
                    Way::multiply(opaque(warp), left, right, diagonal, sums[warp]);
                    if (chunk % kChunks == kChunks - 1 || chunk == chunks - 1)
                        move(sums[warp], totals[warp]);
                }
                lanes([&](int lane) {
                    copies.template wait<kStages - 2>(warp * kLanesOfWarp + lane);
                });
            });
        }
        block.each([&](int thread) { copies.template wait<0>(thread); });
    }

    // One entry of the product, the groups added in order.
    static DOMERGE_DEVICE float gather(const float* spread, int row, int column) {
        const float* const at = spread + row * (kSize + 4) + column;
        float sum = at[0];
        for (int g = 1; g < kGroups; ++g) sum += at[g * kSize * (kSize + 4)];
        return sum;
    }
};

}  // namespace domerge
