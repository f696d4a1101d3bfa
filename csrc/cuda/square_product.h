// Products of square matrices that one thread block has, sum_k left[k][i] right[k][j], on tensor
// cores in parts of TF32 (tf32.h).
//
// A matrix is [kSize, kLd] of float32. Operands in shared memory are read as they lie there; those
// in scratch memory pass through panels of kPanel rows, of which the next is fetched while one is
// used. A warp has every kGridRows-th strip of 16 rows and every kGridColumns-th of 8 columns, so
// that of a product's lower half all warps have about as much.
#pragma once

#include "tf32.h"

namespace domerge {

template <int kWidth>
struct alignas(4 * kWidth) Vec {
    float at[kWidth];
};

template <int kWidth = 4>
DOMERGE_DEVICE Vec<kWidth> load(const float* from) {
    return *reinterpret_cast<const Vec<kWidth>*>(from);
}

template <int kWidth>
DOMERGE_DEVICE void store(float* to, const Vec<kWidth>& values) {
    *reinterpret_cast<Vec<kWidth>*>(to) = values;
}

// Calls visit(row, column) for a thread's share of all fours of a square.
template <int kSide, int kThreads, class Visit>
DOMERGE_DEVICE void for_quads(int thread, Visit visit) {
    DOMERGE_ROLLED
    for (int i = thread; i < kSide * kSide / 4; i += kThreads)
        visit(i / (kSide / 4), i % (kSide / 4) * 4);
}

// The nearest number of TF32. Parts that are cut leave out products of one sign, which shows where
// the penalty is all but zero.
DOMERGE_DEVICE float nearest_tf32(float x) {
    return from_bits((to_bits(x) + 0x1000u) & ~0x1fffu);
}

template <int kSize>
struct SquareProduct {
    static constexpr int kThreads = kSize <= 16 ? 32 : kSize <= 32 ? 64 : 256;
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kGridRows = kWarps == 8 ? 2 : 1;
    static constexpr int kGridColumns = kWarps / kGridRows;
    static constexpr int kRegion = kSize <= 128 ? kSize : 64;  // rows at a time
    static constexpr int kM = kRegion / (16 * kGridRows);      // of a warp
    static constexpr int kN = kSize / (8 * kGridColumns);
    static constexpr int kLd = kSize + 4;  // an odd multiple of four: away from bank conflicts
    static constexpr int kPanel = 8;
    static_assert(kM * 16 * kGridRows == kRegion && kN * 8 * kGridColumns == kSize);
    static_assert(kLd % 8 == 4 && kSize % kRegion == 0);

    struct Panels {
        float left[2][kPanel * kLd];
        float right[2][kPanel * kLd];
    };
    struct Sums {
        Sums16x8 at[kM][kN];
    };

    struct Operands {
        const float* left;
        const float* right;
        // left is given transposed, and right is symmetric.
        bool turned;
        // Only what is below the diagonal is asked for.
        bool half;
    };

    static DOMERGE_DEVICE int grid_row(int warp) { return warp / kGridColumns; }
    static DOMERGE_DEVICE int grid_column(int warp) { return warp % kGridColumns; }

    // The limit that leaves out what is above the diagonal.
    static DOMERGE_DEVICE int half(int begin) { return begin / 8; }

    static DOMERGE_DEVICE void clear(Sums& sums) {
        DOMERGE_UNROLL
        for (int m = 0; m < kM; ++m) DOMERGE_UNROLL
        for (int n = 0; n < kN; ++n) domerge::clear(sums.at[m][n]);
    }

    // to += from, from = 0.
    static DOMERGE_DEVICE void move(Sums& from, Sums& to) {
        DOMERGE_UNROLL
        for (int m = 0; m < kM; ++m) DOMERGE_UNROLL
        for (int n = 0; n < kN; ++n) {
            add(to.at[m][n], from.at[m][n]);
            domerge::clear(from.at[m][n]);
        }
    }

    // Lines from `from` on, kCount / 2 times 8, of eight k: down the columns of a matrix, or along
    // its rows. Which k a lane has is the same for both operands, and such that banks differ.
    template <bool kAlong, int kStride, int kCount>
    static DOMERGE_DEVICE void read(int lane, const float* from, Parts<kCount>& to) {
        constexpr int kLines = kCount / 2;
        lanes_from(lane, [&](int own) {
            const float* const at =
                from + (kAlong ? own / 4 * kStride + own % 4 : own % 4 * 2 * kStride + own / 4);
            DOMERGE_UNROLL
            for (int i = 0; i < kCount; ++i) {
                const int line = i % kLines * 8, next = i / kLines;
                const float number = at[kAlong ? line * kStride + next * 4 : next * kStride + line];
                to.high.of(own)[i] = nearest_tf32(number);
                to.low.of(own)[i] = number - to.high.of(own)[i];
            }
        });
    }

    // Adds `steps` times eight k of both operands. A warp's m-th rows and n-th columns are left out
    // where the n-th columns of all warps begin right of where their m-th rows end, `limit` times
    // eight columns on. kStride: from line to line of both.
    template <bool kAlong, int kStride = kLd>
    static DOMERGE_DEVICE void add_rows(int warp, const float* left, const float* right, int steps,
                                        int limit, Sums& sums) {
        constexpr int kLine = kAlong ? kStride : 1, kStep = kAlong ? 8 : 8 * kStride;
        const int lane = own_lane();
        left += 16 * grid_row(warp) * kLine;
        right += 8 * grid_column(warp) * kLine;
        DOMERGE_ROLLED
        for (int s = 0; s < steps; ++s) {
            const auto columns_at = [&](int n) { return right + 8 * kGridColumns * n * kLine; };
            const auto rows_at = [&](int m) { return left + 16 * kGridRows * m * kLine; };
            const auto add = [&](int m, int n, const Parts<4>& rows, const Parts<2>& columns) {
                if (kGridColumns * n < 2 * kGridRows * (m + 1) + limit)
                    add_product(sums.at[m][n], rows, columns);
            };
            if constexpr (kM < kN) {  // what takes fewer registers is kept
                Parts<4> rows[kM];
                DOMERGE_UNROLL
                for (int m = 0; m < kM; ++m) read<kAlong, kStride>(lane, rows_at(m), rows[m]);
                DOMERGE_UNROLL
                for (int n = 0; n < kN; ++n) {
                    Parts<2> columns;
                    read<kAlong, kStride>(lane, columns_at(n), columns);
                    DOMERGE_UNROLL
                    for (int m = 0; m < kM; ++m) add(m, n, rows[m], columns);
                }
            } else {
                Parts<2> columns[kN];
                DOMERGE_UNROLL
                for (int n = 0; n < kN; ++n) read<kAlong, kStride>(lane, columns_at(n), columns[n]);
                DOMERGE_UNROLL
                for (int m = 0; m < kM; ++m) {
                    Parts<4> rows;
                    read<kAlong, kStride>(lane, rows_at(m), rows);
                    DOMERGE_UNROLL
                    for (int n = 0; n < kN; ++n) add(m, n, rows, columns[n]);
                }
            }
            left += kStep;
            right += kStep;
        }
    }

    // A thread's share of kPanel rows of an operand, on its way to a panel.
    template <int kWidth>
    struct Share {
        static constexpr int kQuads = kPanel * kWidth / 4;
        static constexpr int kEach = (kQuads + kThreads - 1) / kThreads;
        Fragment<Vec<4>, kEach> quads;

        // Rows from k on and columns from `column` on, of a matrix or of its transpose.
        DOMERGE_DEVICE void fetch(int thread, int lane, const float* from, bool turned, int k,
                                  int column) {
            DOMERGE_UNROLL
            for (int n = 0; n < kEach; ++n) {
                const int i = thread + n * kThreads;
                if (kQuads % kThreads != 0 && i >= kQuads) continue;
                const int along = (k + i / (kWidth / 4)) * kLd + column + i % (kWidth / 4) * 4;
                const int across = (column + i % kWidth) * kLd + k + i / kWidth * 4;
                quads.of(lane)[n] = load(from + (turned ? across : along));
            }
        }

        DOMERGE_DEVICE void keep(int thread, int lane, bool turned, float* panel) const {
            DOMERGE_UNROLL
            for (int n = 0; n < kEach; ++n) {
                const int i = thread + n * kThreads;
                if (kQuads % kThreads != 0 && i >= kQuads) continue;
                const Vec<4> quad = quads.of(lane)[n];
                if (turned) {
                    float* const at = panel + i / kWidth * 4 * kLd + i % kWidth;
                    DOMERGE_UNROLL
                    for (int s = 0; s < 4; ++s) at[s * kLd] = quad.at[s];
                } else {
                    store(panel + i / (kWidth / 4) * kLd + i % (kWidth / 4) * 4, quad);
                }
            }
        }
    };

    // Rows [begin, begin + kRegion) of the product over the first `depth` k, in `sums`. The sums of
    // tensor cores are not added to others after some k, as those of Grams are: they are of at most
    // kSize products, of either sign. shared_bytes: where matrices in shared memory end.
    static DOMERGE_DEVICE void multiply(Block<kThreads>& block, Panels& panels,
                                        int64_t shared_bytes, const Operands& x, int depth,
                                        int begin, PerWarp<Sums, kThreads>& sums) {
        const float* const shared = reinterpret_cast<const float*>(block.shared);
        const auto is_shared = [&](const float* at) {
            const int64_t bytes = reinterpret_cast<const char*>(at) - block.shared;
            return bytes >= 0 && bytes < shared_bytes;
        };
        const bool along = x.turned && is_shared(x.left) && is_shared(x.right);
        const bool stage_left = !is_shared(x.left) || (x.turned && !along);
        const bool stage_right = !is_shared(x.right);
        const int rows = stage_left || stage_right ? kPanel : kSize;
        const int limit = x.half ? half(begin) : kSize;
        const auto stage = [&](int warp, int k, auto meanwhile) {
            Share<kRegion> from_left;
            Share<kSize> from_right;
            const int buffer = k / kPanel % 2;
            const bool left = stage_left && k < depth, right = stage_right && k < depth;
            lanes([&](int lane) {
                const int thread = warp * kLanesOfWarp + lane;
                if (left) from_left.fetch(thread, lane, x.left, x.turned, k, begin);
                if (right) from_right.fetch(thread, lane, x.right, false, k, 0);
            });
            meanwhile();
            lanes([&](int lane) {
                const int thread = warp * kLanesOfWarp + lane;
                if (left) from_left.keep(thread, lane, x.turned, panels.left[buffer]);
                if (right) from_right.keep(thread, lane, false, panels.right[buffer]);
            });
        };
        block.warps([&](int warp) { stage(warp, 0, [&] { clear(sums[warp]); }); });
        for (int k = 0; k < depth; k += rows) {
            const int steps = least(rows, depth - k) / 8, buffer = k / kPanel % 2;
            const float* const left = stage_left ? panels.left[buffer]
                                      : along    ? x.left + begin * kLd + k
                                                 : x.left + k * kLd + begin;
            const float* const right = stage_right ? panels.right[buffer]
                                       : along     ? x.right + k
                                                   : x.right + k * kLd;
            const int from = static_cast<int>(left - shared),
                      other = static_cast<int>(right - shared);
            block.warps([&](int warp) {
                stage(warp, k + rows, [&] {
                    // Addresses that are known to be of shared memory.
                    const float* const a = shared + opaque(from);
                    const float* const b = shared + opaque(other);
                    if (along)
                        add_rows<true>(opaque(warp), a, b, steps, limit, sums[warp]);
                    else
                        add_rows<false>(opaque(warp), a, b, steps, limit, sums[warp]);
                });
            });
        }
    }

    // Calls visit(row, pairs) for every row below `rows` of which a thread has sums, and
    // pairs(visit_pair) calls visit_pair(column, pair) for those of two columns each; `limit` as in
    // add_rows.
    template <class Visit>
    static DOMERGE_DEVICE void for_rows(int thread, int begin, int rows, int limit,
                                        const Sums& sums, Visit visit) {
        const int warp = thread / kLanesOfWarp, lane = thread % kLanesOfWarp;
        DOMERGE_UNROLL
        for (int m = 0; m < kM; ++m) DOMERGE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int row = begin + 16 * (kGridRows * m + grid_row(warp)) + 8 * i + lane / 4;
            if (row >= rows) continue;
            visit(row, [&](auto visit_pair) {
                DOMERGE_UNROLL
                for (int n = 0; n < kN; ++n) {
                    if (kGridColumns * n >= 2 * kGridRows * (m + 1) + limit) continue;
                    const auto& from = sums.at[m][n].of(lane);
                    const int column = 8 * (kGridColumns * n + grid_column(warp)) + lane % 4 * 2;
                    visit_pair(column, Vec<2>{{from[2 * i], from[2 * i + 1]}});
                }
            });
        }
    }
};

}  // namespace domerge
