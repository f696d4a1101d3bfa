// A tile of a product of matrices in memory, on tensor cores in parts of TF32: panels of kDepth k
// come to shared memory by asynchronous copies while the one before is multiplied.
#pragma once

#include "copies.h"
#include "tiles_state.h"

namespace domerge {

struct TileProduct {
    using Square = SquareProduct<kTile>;
    using Sums = Square::Sums;
    static constexpr int kThreads = kTileThreads;
    static_assert(Square::kThreads == kThreads);
    static constexpr int kDepth = 32;
    static constexpr int kChain = 64;  // k after which sums are added to others
    static constexpr int kStages = 2;
    // Lines along k have kDepth numbers, those across it kTile. Strides keep lanes in different
    // banks and copies aligned.
    static constexpr int kAlongLd = kDepth + 4, kAcrossLd = Square::kLd;
    static constexpr int kPanel = kTile * kAlongLd;
    static_assert(kDepth * kAcrossLd <= kPanel);
    static constexpr int64_t kPanelBytes = int64_t{4} * kStages * 2 * kPanel;
    static constexpr int64_t kSharedBytes = kPanelBytes >
                                                    static_cast<int64_t>(sizeof(TiledState::Shared))
                                                ? kPanelBytes
                                                : sizeof(TiledState::Shared);
    static_assert(kSharedBytes <= kSmallestShared);

    Block<kThreads>& block;
    Copies<kThreads> copies;
    PerWarp<Sums, kThreads> sums, totals;

    DOMERGE_DEVICE explicit TileProduct(Block<kThreads>& block) : block(block) {}

    DOMERGE_DEVICE void clear() {
        block.warps([&](int warp) {
            Square::clear(sums[warp]);
            Square::clear(totals[warp]);
        });
    }

    // Starts the way of k to k + kDepth of an operand to shared memory.
    template <bool kAlong>
    DOMERGE_DEVICE void start(int thread, float* to, const float* from, int ld, int k) {
        constexpr int kUnits = (kAlong ? kDepth : kTile) / 4;  // of a line
        DOMERGE_UNROLL
        for (int e = 0; e < kTile * kDepth / 4 / kThreads; ++e) {
            const int i = thread + e * kThreads, line = i / kUnits, unit = i % kUnits * 4;
            const int64_t place =
                kAlong ? int64_t{line} * ld + k + unit : int64_t{k + line} * ld + unit;
            copies.template start<16>(thread, to + line * (kAlong ? kAlongLd : kAcrossLd) + unit,
                                      from + place, 16);
        }
    }

    // totals += the sum over k < depth, a multiple of kDepth, of left(k, i) right(k, j): operands
    // along k begin at row i, or j, of their matrix; others at that column. `limit` as in
    // SquareProduct::add_rows.
    template <bool kAlong>
    DOMERGE_DEVICE void add(const float* left, const float* right, int ld, int depth, int limit) {
        float* const shared = reinterpret_cast<float*>(block.shared);
        const int panels = depth / kDepth;
        for (int panel = -1; panel < panels; ++panel) {
            block.warps([&](int warp) {
                float* const to = shared + (panel + 1) % kStages * 2 * kPanel;
                lanes([&](int lane) {
                    const int thread = opaque(warp * kLanesOfWarp + lane);
                    if (panel + 1 < panels) {
                        start<kAlong>(thread, to, left, ld, (panel + 1) * kDepth);
                        start<kAlong>(thread, to + kPanel, right, ld, (panel + 1) * kDepth);
                    }
                    copies.commit(thread);
                });
                if (panel >= 0) {
                    const float* const own = shared + panel % kStages * 2 * kPanel;
                    Square::add_rows<kAlong, kAlong ? kAlongLd : kAcrossLd>(
                        opaque(warp), own, own + kPanel, kDepth / 8, limit, sums[warp]);
                    if (panel % (kChain / kDepth) == kChain / kDepth - 1 || panel == panels - 1)
                        Square::move(sums[warp], totals[warp]);
                }
                lanes([&](int lane) { copies.template wait<0>(warp * kLanesOfWarp + lane); });
            });
        }
    }

    // Calls visit(i, j, pair) for every pair of this thread's entries.
    template <class Visit>
    DOMERGE_DEVICE void for_pairs(int thread, int limit, Visit visit) {
        Square::for_rows(
            thread, 0, kTile, limit, totals[thread / kLanesOfWarp],
            [&](int i, auto pairs) { pairs([&](int j, Vec<2> pair) { visit(i, j, pair); }); });
    }
};

}  // namespace domerge
