// X X^T of a tile of rows, in float64.
#pragma once

#include "tile.h"

namespace domerge {

// Rows [first, first + kSize) of `left` times those from `second` on of `right`, over the columns
// from `begin` to the readers' end. Unscaled. kAlone: first and second are always the same.
template <class Format, int kSize, int kDepth, bool kAlone>
struct GramProduct {
    using T = double;
    static constexpr int kThreads = kBlockThreads;
    using Product = Tile<T, kSize, kSize, 4, 4>;
    using Staged = Stage<Format, T, kDepth, kSize>;
    using Sums = PerThread<typename Product::Sums, kBlockThreads>;
    static constexpr int kBuffer = (kAlone ? 1 : 2) * Staged::kSize;
    static constexpr int64_t kStagedBytes = 2 * kBuffer * sizeof(T);
    static constexpr int64_t kSpreadBytes = Product::kSpread * sizeof(T);
    static constexpr int64_t kSharedBytes =
        kStagedBytes > kSpreadBytes ? kStagedBytes : kSpreadBytes;

    // Afterwards the product is in shared memory, for Product::gather.
    static DOMERGE_DEVICE void run(Block<kBlockThreads>& block, const Reader<Format>& reader,
                                   int first, int second, int begin) {
        T* const shared = reinterpret_cast<T*>(block.shared);
        const bool across = !reader.columns, same = kAlone || first == second;
        Sums sums;
        const auto fetch = [&](int thread, int row, int c, typename Staged::Held& held) {
            Staged::fetch(thread, across, held,
                          [&](int depth, int line) { return reader.read(row + line, c + depth); });
        };
        const auto put = [&](int thread, const typename Staged::Held& held, T* to) {
            Staged::put(thread, across, held, to, [](const Words& words, int, int, auto& values) {
                unpack<Format>(words, values);
            });
        };
        const auto stage = [&](int thread, int c, T* to, auto meanwhile) {
            typename Staged::Held left, right;
            fetch(thread, first, c, left);
            if (!same) fetch(thread, second, c, right);
            meanwhile();
            put(thread, left, to);
            if (!same) put(thread, right, to + Staged::kSize);
        };
        block.each([&](int thread) {
            Product::clear(sums[thread]);
            stage(thread, begin, shared, [] {});
        });
        int now = 0;
        for (int c = begin; c < reader.end; c += kDepth, now ^= 1) {
            const T* const left = shared + now * kBuffer;
            const T* const right = same ? left : left + Staged::kSize;
            block.each([&](int thread) {
                stage(thread, c + kDepth, shared + (now ^ 1) * kBuffer, [&] {
                    Product::template add_product<kDepth, Staged::kStride, Staged::kStride>(
                        thread, left, right, sums[thread]);
                });
            });
        }
        block.each([&](int thread) { Product::spread(thread, sums[thread], shared); });
    }

    static DOMERGE_DEVICE T gather(const T* product, int row, int column) {
        return Product::gather(product, row, column);
    }
};

}  // namespace domerge
