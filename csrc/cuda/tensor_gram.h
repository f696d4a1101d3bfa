// X X^T of a tile of rows on tensor cores: of 16-bit elements, or of float32 in parts of TF32.
//
// A warp has a strip of 16 rows, or half of one in large tiles, up to the diagonal in a tile on it;
// the warps of a scheduler have strips that are as long together as those of the others. Small
// tiles have groups of warps, which share the columns. A tensor core cuts off what it adds, so that
// long sums would come out small: after kChain columns they are added, rounded to nearest, to
// others.
#pragma once

#include "lines.h"
#include "tile.h"

namespace domerge {

template <class Format, int kSize>
struct TensorGram {
    static constexpr bool kInParts = sizeof(typename Format::Storage) == 4;
    static constexpr int kVector = kLanes<Format>;
    static constexpr int kThreads = kSize < 64 ? kBlockThreads : 2 * kBlockThreads;
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kStrips = kSize / 16;
    static constexpr int kParts = kSize < 64 ? 1 : 2;  // of a strip
    static constexpr int kBlocks = kStrips / kParts;   // of 16 x 16, of a warp
    static constexpr int kGroups = kWarps / (kStrips * kParts);
    // Columns at a time.
    static constexpr int kColumns = (kSize <= 16 ? 32 : kSize <= 32 ? 16 : 8) * kVector;
    static constexpr int kOwn = kColumns / kGroups;     // columns of a group
    static constexpr int kChain = kInParts ? 64 : 128;  // in parts, each is added three times
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
    static_assert(kGroups * kStrips * kParts == kWarps && kChain % kOwn == 0);

    struct Sums {
        Sums16x8 at[kBlocks][2];
    };

    // Warps w, w + 4, … are of one scheduler.
    static DOMERGE_DEVICE int group(int warp) { return warp / (kStrips * kParts); }
    static DOMERGE_DEVICE int part(int warp) { return kParts == 1 ? 0 : warp / 4 % kParts; }
    static DOMERGE_DEVICE int strip(int warp) {
        const int place = warp % (kStrips < 4 ? kStrips : 4);
        return warp < kWarps / 2 ? place : kStrips - 1 - place;
    }

    template <bool kInColumns>
    struct Way {
        using Lines = domerge::Lines<Format, kInColumns, kSize, kColumns, kThreads>;
        static constexpr int kStep = Lines::kBlockColumns;
        static_assert(kOwn % kStep == 0);

        static DOMERGE_DEVICE void multiply(int warp, const Words* left, const Words* right,
                                            bool diagonal, Sums& sums) {
            const int lane = own_lane();
            const int own = strip(warp), first = part(warp) * kBlocks;
            const int last = (diagonal ? own : kStrips - 1) - first;
            if (last < 0) return;
            DOMERGE_ROLLED
            for (int k = 0; k < kOwn; k += kStep) {
                const int column = group(warp) * kOwn + k;
                if constexpr (kInParts) {
                    Parts<4> rows;
                    Lines::load(left, lane, 16 * own, column, rows);
                    DOMERGE_UNROLL
                    for (int j = 0; j < kBlocks; ++j) {
                        if (j > last) break;  // products of parts take longer than the branch
                        Parts<4> others;
                        Lines::load(right, lane, 16 * (first + j), column, others);
                        DOMERGE_UNROLL
                        for (int half = 0; half < 2; ++half)
                            add_product(sums.at[j][half], rows, others, half);
                    }
                } else {
                    Block16x16 rows, others[kBlocks];
                    Lines::load(left, lane, 16 * own, column, rows);
                    DOMERGE_UNROLL
                    for (int j = 0; j < kBlocks; ++j)
                        Lines::load(right, lane, 16 * (first + j), column, others[j], j <= last);
                    DOMERGE_UNROLL
                    for (int j = 0; j < kBlocks; ++j) DOMERGE_UNROLL
                    for (int half = 0; half < 2; ++half)
                        add_product<Format>(sums.at[j][half], rows, others[j], half);
                }
            }
        }
    };

    static DOMERGE_DEVICE void clear(Sums& sums) {
        DOMERGE_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
            domerge::clear(sums.at[j][0]);
            domerge::clear(sums.at[j][1]);
        }
    }

    static DOMERGE_DEVICE void move(Sums& from, Sums& to) {
        DOMERGE_UNROLL
        for (int j = 0; j < kBlocks; ++j) DOMERGE_UNROLL
        for (int half = 0; half < 2; ++half) {
            add(to.at[j][half], from.at[j][half]);
            domerge::clear(from.at[j][half]);
        }
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
            const int line = group(warp) * kSize + 16 * strip(warp);
            const int column = 16 * kBlocks * part(warp);
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int j = 0; j < kBlocks; ++j) DOMERGE_UNROLL
                for (int half = 0; half < 2; ++half) DOMERGE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const auto& from = found.at[j][half].of(lane);
                    float* const to = spread + (line + lane / 4 + 8 * i) * (kSize + 4) + column +
                                      16 * j + 8 * half + lane % 4 * 2;
                    to[0] = from[2 * i];
                    to[1] = from[2 * i + 1];
                }
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
