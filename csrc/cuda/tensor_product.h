// C X of 16-bit X on tensor cores, for apply and apply_decouple.
//
// C, float32, is split into two 16-bit parts that together have its 16 leading bits in bfloat16,
// and 22 in float16, where every row is first brought to a size that float16 holds. The parts stay
// in shared memory while tiles of X pass. Results lie in registers as they lie in memory: of X in
// columns it is X^T C^T that is computed. Sums over more than kDepth rows of X are added, rounded
// to nearest, to others: a tensor core cuts off.
#pragma once

#include "lines.h"
#include "product.h"

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
        static constexpr int kHeight = kInColumns ? (kRows == 32 ? 32 : 64) : least_of(kRows, 64);
        static constexpr int kWidth = kInColumns ? least_of(kRows, 32) : (kRows == 16 ? 64 : 32);
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
    static constexpr int kSourceBytes = kAhead * kSteps * kStep * 12;
    static constexpr int kTopBytes = kRows * sizeof(uint32_t);
    static constexpr int64_t kSharedBytes =
        sizeof(Words) * (2 * kPart + kStages * kStage) + kSourceBytes + kTopBytes;
    static_assert(kSharedBytes <= kSmallestShared);

    Words* parts;
    Words* stages;
    char* sources;
    uint32_t* tops;  // the bits of the largest magnitude of every row of C

    DOMERGE_DEVICE explicit TensorProduct(char* shared)
        : parts(reinterpret_cast<Words*>(shared)),
          stages(parts + 2 * kPart),
          sources(reinterpret_cast<char*>(stages + kStages * kStage)),
          tops(reinterpret_cast<uint32_t*>(sources + kSourceBytes)) {}

    // A power of two, and its inverse, that brings the largest of a row to 2^14.
    DOMERGE_DEVICE float factor(int row) const {
        if constexpr (!kScaled) return 1.0f;
        const uint32_t exponent = tops[row] >> 23;
        return from_bits((exponent < 15 ? 253 : 268 - exponent) << 23);
    }
    DOMERGE_DEVICE float inverse(int row) const {
        if constexpr (!kScaled) return 1.0f;
        const uint32_t exponent = tops[row] >> 23;
        return from_bits((exponent < 15 ? 1 : exponent - 14) << 23);
    }

    // Eight numbers of a row of C, each times the scale of its row of X.
    static DOMERGE_DEVICE void read(const Matrix& c, const Reader<Format>& x, int row, int k,
                                    float (&to)[8]) {
        DOMERGE_UNROLL
        for (int i = 0; i < 8; i += 4) {
            const Words words = c.read(row, k + i);
            DOMERGE_UNROLL
            for (int l = 0; l < 4; ++l) to[i + l] = from_bits(words.at[l]);
        }
        if (k >= x.rows) return;
        float scale = static_cast<float>(x.block(k).scale);
        const bool alike = x.owner[k] == x.owner[least(k + 8, x.rows) - 1];
        DOMERGE_UNROLL
        for (int i = 0; i < 8; ++i) {
            if (!alike && k + i < x.rows) scale = static_cast<float>(x.block(k + i).scale);
            to[i] *= scale;
        }
    }

    DOMERGE_DEVICE void find_tops(Block<kThreads>& block, const Matrix& c, const Reader<Format>& x,
                                  int row) const {
        if constexpr (!kScaled) return;
        block.each([&](int thread) {
            for (int i = thread; i < kRows; i += kThreads) tops[i] = 0;
        });
        block.each([&](int thread) {
            const int units = (c.columns + 7) / 8;
            DOMERGE_ROLLED
            for (int v = thread; v < kRows * units; v += kThreads) {
                float values[8];
                read(c, x, row + v / units, v % units * 8, values);
                uint32_t top = 0;
                DOMERGE_UNROLL
                for (int i = 0; i < 8; ++i) {
                    const uint32_t size = to_bits(values[i]) & 0x7fffffffu;
                    top = size > top ? size : top;
                }
                raise_atomically(tops + v / units, top);
            }
        });
    }

    // The parts of kDepth columns of C, from column k on.
    DOMERGE_DEVICE void split(int thread, const Matrix& c, const Reader<Format>& x, int row,
                              int k) const {
        DOMERGE_ROLLED
        for (int v = thread; v < kPart; v += kThreads) {
            const int line = v / (kDepth / 8), unit = v % (kDepth / 8);
            float values[8];
            read(c, x, row + line, k + 8 * unit, values);
            const float size = factor(line);
            Words high, low;
            DOMERGE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float a = values[2 * i] * size, b = values[2 * i + 1] * size;
                high.at[i] = pack<Format>(a, b);
                low.at[i] = pack<Format>(a - Format::load(static_cast<uint16_t>(high.at[i])),
                                         b - Format::load(static_cast<uint16_t>(high.at[i] >> 16)));
            }
            *Left::at(parts, line, unit) = high;
            *Left::at(parts + kPart, line, unit) = low;
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
    DOMERGE_DEVICE void run(Block<kThreads>& block, const Matrix& c, const Reader<Format>& x,
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
        WarpSums totals;
        Copies<kThreads> copies;
        find_tops(block, c, x, row);
        block.each([&](int thread) {
            locate(thread, 0);
            if (depths > 1) locate(thread, 1);
        });
        block.warps([&](int warp) { clear(sums[warp], totals[warp]); });
        for (int i = 1 - kStages; i < tiles * steps; ++i) {
            const int coming = i + kStages - 1, step = (i + steps * kStages) % steps;
            if (i == 0 || (i > 0 && depths > 1 && step % kSteps == 0))
                block.each([&](int thread) {
                    split(thread, c, x, row, step * kStep);
                    if (depths > 1) locate(thread, depth_of(i) + 2);
                });
            block.warps([&](int warp) {
                lanes([&](int lane) {
                    const int thread = warp * kLanesOfWarp + lane;
                    if (coming < tiles * steps)
                        Lines::start(copies, thread, stages + coming % kStages * kStage, x,
                                     *sources_of(depth_of(coming), coming % steps % kSteps),
                                     coming % steps * kStep, column + coming / steps * kColumns);
                    copies.commit(thread);
                });
                if (i >= 0) {
                    multiply<kInColumns>(opaque(warp), stages + i % kStages * kStage,
                                         step % kSteps * kStep, sums[warp]);
                    const bool last = step == steps - 1;
                    if (depths > 1 && (last || step % kSteps == kSteps - 1))
                        move(sums[warp], totals[warp]);
                    if (last) {
                        if (depths > 1) move(totals[warp], sums[warp]);
                        finish(warp, i / steps, sums[warp]);
                        if (i + 1 < tiles * steps) clear(sums[warp], totals[warp]);
                    }
                }
                lanes([&](int lane) {
                    copies.template wait<kStages - 2>(warp * kLanesOfWarp + lane);
                });
            });
        }
        block.each([&](int thread) { copies.template wait<0>(thread); });
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
