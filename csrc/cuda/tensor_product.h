// C X of 16-bit X on tensor cores, for apply and apply_decouple.
//
// C is in two 16-bit parts (split_matrix.h). Of kDepth columns these are in shared memory: where C
// has no more they stay while tiles of X pass, and otherwise they come step by step, as X does.
// Results lie in registers as they lie in memory: of X in columns it is X^T C^T that is computed.
// Sums over more than kDepth rows of X are added, rounded to nearest, to others: a tensor core cuts
// off.
#pragma once

#include "lines.h"
#include "product.h"
#include "split_matrix.h"

namespace domerge {

// visit(bool_constant): whether tensor cores make these results: of 16-bit X, and of bfloat16 where
// they are rounded to 16 bits themselves.
template <class Format, class Visit>
void on_tensor_cores(DType out_dtype, Visit visit) {
    if constexpr (std::is_same_v<Format, Float16>)
        visit(std::true_type{});
    else if constexpr (std::is_same_v<Format, Float32>)
        visit(std::false_type{});
    else if (out_dtype == DType::float32)
        visit(std::false_type{});
    else
        visit(std::true_type{});
}

template <class Format, int kRows>
struct TensorProduct {
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kColumns = kTileColumns<kRows>;
    static constexpr int kDepth = kRows > 128 ? 64 : 128;  // columns of C that are there at a time
    static constexpr int kStep = kRows > 16 ? 32 : 16;     // rows of X that come at a time
    static constexpr int kStages = 3;
    static constexpr int kAhead = 3;                  // depths whose rows' places are known
    static constexpr int kPart = kRows * kDepth / 8;  // Words
    static constexpr int kStage = kStep * kColumns / 8;
    static constexpr bool kScaled = std::is_same_v<Format, Float16>;
    static constexpr bool kAlways16Bit = !kScaled;  // results, see on_tensor_cores
    using Left = Swizzled<kDepth / 8>;

    // What a warp computes: kDown blocks of 16 rows, kAcross of 8 columns, of X^T C^T in columns.
    template <bool kInColumns>
    struct Shape {
        static constexpr int kHeight = kInColumns ? (kRows == 32 ? 32 : 64) : least_of(kRows, 32);
        static constexpr int kWidth = kInColumns ? least_of(kRows, 32) : (kRows == 32 ? 32 : 64);
        static constexpr int kDown = kHeight / 16, kAcross = kWidth / 8;
        static constexpr int kWarpsAcross = (kInColumns ? kRows : kColumns) / kWidth;
        static_assert(kWarps % kWarpsAcross == 0 &&
                      kWarps / kWarpsAcross * kHeight == (kInColumns ? kColumns : kRows));

        static DOMERGE_DEVICE int row(int warp) { return warp / kWarpsAcross * kHeight; }
        static DOMERGE_DEVICE int column(int warp) { return warp % kWarpsAcross * kWidth; }
    };
    static constexpr int kCount = Shape<false>::kDown * Shape<false>::kAcross;
    static_assert(kCount == Shape<true>::kDown * Shape<true>::kAcross);

    struct Sums {
        Sums16x8 at[kCount];
    };
    using WarpSums = PerWarp<Sums, kThreads>;

    template <bool kInColumns>
    using LinesOf = Lines<Format, kInColumns, kStep, kColumns, kThreads>;

    static constexpr int kSteps = kDepth / kStep;
    static_assert((kSteps & (kSteps - 1)) == 0);
    static constexpr int kPartLines = least_of(kThreads / (kStep / 8), kRows);  // that come at once
    static constexpr int kPartsAhead = least_of(kSteps, kStages) - 1;  // steps that C comes before
    static constexpr int kSourceBytes = kAhead * kSteps * kStep * 12;
    static constexpr int kInverseBytes = kRows * sizeof(float);
    static constexpr int64_t kSharedBytes =
        sizeof(Words) * (2 * kPart + kStages * kStage) + kSourceBytes + kInverseBytes;
    static_assert(kSharedBytes <= kSmallestShared);

    Words* parts;
    Words* stages;
    char* sources;
    float* inverses;

    DOMERGE_DEVICE explicit TensorProduct(char* shared)
        : parts(reinterpret_cast<Words*>(shared)),
          stages(parts + 2 * kPart),
          sources(reinterpret_cast<char*>(stages + kStages * kStage)),
          inverses(reinterpret_cast<float*>(sources + kSourceBytes)) {}

    // What a row of results is to be multiplied by.
    DOMERGE_DEVICE float inverse(int row) const { return kScaled ? inverses[row] : 1.0f; }

    DOMERGE_DEVICE void fetch_inverses(int thread, const SplitMatrix& c, int row) const {
        if constexpr (kScaled)
            for (int i = thread; i < kRows; i += kThreads)
                inverses[i] = row + i < c.rows ? c.inverse(row + i) : 0.0f;
    }

    // Starts the way of a step's columns of C to their place in shared memory.
    static DOMERGE_DEVICE void start_parts(Copies<kThreads>& copies, int thread, Words* parts,
                                           const SplitMatrix& c, int row, int step, int place) {
        constexpr int kUnits = kStep / 8, kLines = kPartLines;
        const int line = thread / kUnits, unit = thread % kUnits, from_unit = step * kUnits + unit;
        if (line >= kLines) return;
        const int lines = from_unit < c.units ? c.rows - row : 0;
        const Words* from = c.at(row + line, from_unit);
        Words* to = Left::at(parts, line, place * kUnits + unit);
        DOMERGE_UNROLL
        for (int l = 0; l < kRows; l += kLines) {
            const int bytes = line + l < lines ? 16 : 0;
            copies.template start<16>(thread, to, from, bytes);
            copies.template start<16>(thread, to + kPart, from + c.units, bytes);
            from += int64_t{kLines} * 2 * c.units;
            to += kLines * (kDepth / 8);
        }
    }

    template <bool kInColumns>
    DOMERGE_DEVICE void multiply(int warp, const Words* x, int k, Sums& sums) const {
        using Shape = typename TensorProduct::template Shape<kInColumns>;
        using Tile = typename LinesOf<kInColumns>::Tile;
        using Cs = std::conditional_t<kInColumns, Right16x16, Left16x16>;
        using Xs = std::conditional_t<kInColumns, Left16x16, Right16x16>;
        constexpr int kCs = (kInColumns ? Shape::kWidth : Shape::kHeight) / 16;
        constexpr int kXs = (kInColumns ? Shape::kHeight : Shape::kWidth) / 16;
        const int lane = own_lane(), row = Shape::row(warp), column = Shape::column(warp);
        const auto from = Tile::template corner<!kInColumns>(x, kInColumns ? row : column, 0);
        const auto left = Left::template corner<false>(parts, kInColumns ? column : row, k);
        DOMERGE_UNROLL
        for (int step = 0; step < kStep; step += 16) {
            Xs xs[kXs];
            DOMERGE_UNROLL
            for (int i = 0; i < kXs; ++i)
                Tile::template load<!kInColumns>(from, lane, 16 * i, step, xs[i]);
            DOMERGE_UNROLL
            for (int part = 0; part < 2; ++part) {
                Cs cs[kCs];
                DOMERGE_UNROLL
                for (int i = 0; i < kCs; ++i)
                    Left::template load<false>(left, lane, part * kRows + 16 * i, step, cs[i]);
                DOMERGE_UNROLL
                for (int i = 0; i < Shape::kDown; ++i) DOMERGE_UNROLL
                for (int j = 0; j < Shape::kAcross; ++j) {
                    Sums16x8& to = sums.at[i * Shape::kAcross + j];
                    if constexpr (kInColumns)
                        add_product<Format>(to, xs[i], cs[j / 2], j % 2);
                    else
                        add_product<Format>(to, cs[i], xs[j / 2], j % 2);
                }
            }
        }
    }

    // C[row, …] X[…, column] of `tiles` tiles side by side: finish(warp, tile, sums) takes what a
    // warp has of each, times `factor`, within a phase.
    template <bool kInColumns, class Finish>
    DOMERGE_DEVICE void run(Block<kThreads>& block, const SplitMatrix& c, const Reader<Format>& x,
                            int row, int column, int tiles, WarpSums& sums, Finish finish) const {
        using Lines = LinesOf<kInColumns>;
        using Sources = typename Lines::Sources;
        static_assert(sizeof(Sources) <= kStep * 12);
        const auto sources_of = [&](int depth, int step) {
            return reinterpret_cast<Sources*>(sources) + depth % kAhead * kSteps + step;
        };
        const int steps = (x.rows + kStep - 1) / kStep;  // of a tile
        const int depths = (steps + kSteps - 1) / kSteps;
        const auto locate = [&](int thread, int depth) {
            for (int step = 0; step < kSteps; ++step)
                Lines::locate(thread, x, (depth % depths * kSteps + step) * kStep,
                              *sources_of(depth, step));
        };
        // The number of a step's depth, of all tiles; one alone serves all of them.
        const auto depth_of = [&](int i) {
            return depths == 1 ? 0 : i / steps * depths + i % steps / kSteps;
        };
        const int count = tiles * steps;
        const bool stays = depths == 1;  // C, once it is there
        WarpSums totals;
        Copies<kThreads> copies;
        block.each([&](int thread) {
            locate(thread, 0);
            if (depths > 1) locate(thread, 1);
            fetch_inverses(thread, c, row);
        });
        block.warps([&](int warp) { clear(sums[warp], totals[warp]); });
        for (int i = 1 - kStages; i < count; ++i) {
            const int coming = i + kStages - 1, step = (i + steps * kStages) % steps;
            const bool first = step % kSteps == 0, last = step == steps - 1;
            // Of C the place of what is multiplied, and what comes; in turns where it does not
            // stay.
            const int place = stays ? step : i & (kSteps - 1), next = i + kPartsAhead;
            const int of_next = stays ? next : wrapped(step + kPartsAhead, steps);
            block.warps([&](int warp) {
                lanes([&](int lane) {
                    const int thread = warp * kLanesOfWarp + lane;
                    if (next >= 0 && next < (stays ? steps : count))
                        start_parts(copies, thread, parts, c, row, of_next, next & (kSteps - 1));
                    copies.commit(thread);
                    if (coming < count)
                        Lines::start(copies, thread, stages + coming % kStages * kStage, x,
                                     *sources_of(depth_of(coming), coming % steps % kSteps),
                                     coming % steps * kStep, column + coming / steps * kColumns);
                    copies.commit(thread);
                    if (i >= 0 && !stays && first) locate(thread, depth_of(i) + 2);
                });
                if (i >= 0) {
                    multiply<kInColumns>(opaque(warp), stages + i % kStages * kStage, place * kStep,
                                         sums[warp]);
                    if (!stays && (last || step % kSteps == kSteps - 1))
                        move(sums[warp], totals[warp]);
                    if (last) {
                        if (!stays) move(totals[warp], sums[warp]);
                        finish(warp, i / steps, sums[warp]);
                        if (i + 1 < count) clear(sums[warp], totals[warp]);
                    }
                }
                lanes([&](int lane) {
                    copies.template wait<kPartsAhead>(warp * kLanesOfWarp + lane);
                });
            });
        }
        block.each([&](int thread) { copies.template wait<0>(thread); });
    }

    static DOMERGE_DEVICE int wrapped(int step, int steps) {
        return step < steps ? step : step - steps;
    }

    static DOMERGE_DEVICE void clear(Sums& sums, Sums& totals) {
        DOMERGE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            domerge::clear(sums.at[i]);
            domerge::clear(totals.at[i]);
        }
    }

    static DOMERGE_DEVICE void move(Sums& from, Sums& to) {
        DOMERGE_UNROLL
        for (int i = 0; i < kCount; ++i) {
            add(to.at[i], from.at[i]);
            domerge::clear(from.at[i]);
        }
    }
};

}  // namespace domerge
