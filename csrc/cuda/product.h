// C X of a tile of rows and a tile of columns, for apply and apply_decouple.
#pragma once

#include "tile.h"

namespace domerge {

// Rows of C, and columns of X, that a tile of a size has.
template <int kRows>
constexpr int kTileColumns = kRows == 16   ? 512
                             : kRows == 32 ? 256
                                           : 16384 / kRows;

// A row-major matrix of float32, four elements of a row at a time.
struct Matrix {
    const float* data;
    int rows;
    int columns;

    DOMERGE_DEVICE Matrix(Address data, int rows, int columns)
        : data(reinterpret_cast<const float*>(data)), rows(rows), columns(columns) {}

    DOMERGE_DEVICE Words read(int row, int column) const {
        Words words{};
        if (row >= rows || column >= columns) return words;
        const float* from = global(data + static_cast<int64_t>(row) * columns + column);
        const int left = columns - column;
        if (left >= 4 && is_aligned(from, 16)) return vector_at<const Words>(from);
        DOMERGE_UNROLL
        for (int i = 0; i < 4; ++i)
            if (i < left) words.at[i] = to_bits(from[i]);
        return words;
    }
};

template <class Format, int kRows>
struct Product {
    static constexpr int kColumns = kTileColumns<kRows>;
    static constexpr int kDepth = 2 * kLanes<Format>;
    using Result = Tile<float, kRows, kColumns, kRows <= 32 ? 4 : 8, 8>;
    using Left = Stage<Float32, float, kDepth, kRows>;
    using Right = Stage<Format, float, kDepth, kColumns>;
    using Sums = PerThread<typename Result::Sums, kBlockThreads>;
    static constexpr int kBuffer = Left::kSize + Right::kSize;
    static constexpr int kShared = 2 * kBuffer;  // floats
    static_assert(Result::kGroups == 1);

    // sums = C[row, ...] X[..., column] with what each thread's part of a tile takes.
    static DOMERGE_DEVICE void run(Block<kBlockThreads>& block, float* shared, const Matrix& c,
                                   const Reader<Format>& x, int row, int column, Sums& sums) {
        const auto stage = [&](int thread, int k, float* to, auto meanwhile) {
            typename Left::Held left;
            typename Right::Held right;
            Left::fetch(thread, true, left,
                        [&](int depth, int line) { return c.read(row + line, k + depth); });
            Right::fetch(thread, x.columns, right,
                         [&](int depth, int line) { return x.read(k + depth, column + line); });
            meanwhile();
            Left::put(thread, true, left, to, [](const Words& words, int, int, auto& values) {
                unpack<Float32>(words, values);
            });
            Right::put(thread, x.columns, right, to + Left::kSize,
                       [&](const Words& words, int depth, int, auto& values) {
                           x.scale(words, k + depth, values);
                       });
        };
        block.each([&](int thread) {
            Result::clear(sums[thread]);
            stage(thread, 0, shared, [] {});
        });
        int now = 0;
        for (int k = 0; k < c.columns; k += kDepth, now ^= 1) {
            const float* const left = shared + now * kBuffer;
            block.each([&](int thread) {
                stage(thread, k + kDepth, shared + (now ^ 1) * kBuffer, [&] {
                    Result::template add_product<kDepth, Left::kStride, Right::kStride>(
                        thread, left, left + Left::kSize, sums[thread]);
                });
            });
        }
    }
};

}  // namespace domerge
