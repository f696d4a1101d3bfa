// ||S a|| and ||a|| of columns a of a matrix, S [rank, rank], on tensor cores at float32 accuracy.
//
// S is triangular: row i is zero before column i. It lies in blocks of 8 x 8, each as the lanes of
// a warp take it, row by row of blocks, padded with zeros; behind it is the row of a that each of
// its columns is for (roots.cu). Four lanes read rows of a that may share banks: two reads are one
// after the other then, where with rows in order none would be.
#pragma once

#include "tf32.h"

namespace domerge {

DOMERGE_DEVICE int eights_of(int rank) {
    return (rank + 7) / 8;
}

// Where an entry of S is.
DOMERGE_DEVICE int root_place(int rank, int row, int column) {
    const int lane = row % 8 * 4 + column % 4, block = row / 8 * eights_of(rank) + column / 8;
    return 64 * block + 2 * lane + column / 4 % 2;
}

// What a warp does to 32 columns of a row-major matrix, of which each row is kStride numbers.
template <int kStride>
struct Magnitudes {
    static_assert(kStride % 32 == 8);  // so that neighbouring rows are in different banks
    static constexpr int kColumns = 32;

    // Of columns g, g + 8, g + 16 and g + 24, lane 4 g + t.
    using Each = Fragment<float, 4>;
    Each mapped;  // ||S a||^2
    Each own;     // ||a||^2

    DOMERGE_DEVICE Magnitudes(const float* s, int rank, float* a) {
        converge();
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int j = 0; j < 4; ++j) mapped.of(lane)[j] = own.of(lane)[j] = 0.0f;
        });
        int row = 0;
        DOMERGE_ROLLED
        for (; row + 16 < rank; row += 32) add_rows<4>(s, rank, a, row);
        if (row < rank) add_rows<2>(s, rank, a, row);
        each(a, rank, [&](int lane, int j, float& at) { own.of(lane)[j] += at * at; });
        add_quads(mapped);
        add_quads(own);
    }

    // Eight times kEights rows of S: what is read and split of the columns serves all of them.
    template <int kEights>
    DOMERGE_DEVICE void add_rows(const float* s, int rank, float* a, int row) {
        struct alignas(8) Pair {
            float at[2];
        };
        Sums16x8 sums[2][kEights];  // of 16 columns and 8 rows
        DOMERGE_UNROLL
        for (int i = 0; i < 2; ++i) DOMERGE_UNROLL
        for (int j = 0; j < kEights; ++j) clear(sums[i][j]);
        const int eights = eights_of(rank);
        const bool all = row + 8 * (kEights - 1) < rank;
        const auto* const rows_of_a = reinterpret_cast<const int*>(s + 64 * eights * eights);
        DOMERGE_ROLLED
        for (int k = row; k < rank; k += 8) {
            Parts<4> columns[2];
            Parts<2> rows[kEights];
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int column = k + lane % 4 + 4 * i;
                    const float* const line = a + rows_of_a[column] * kStride + lane / 4;
                    DOMERGE_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const float entry = column < rank ? line[8 * j] : 0.0f;
                        columns[j / 2].put(lane, j % 2 + 2 * i, entry);
                    }
                }
                const float* const from = s + 64 * (row / 8 * eights + k / 8) + 2 * lane;
                DOMERGE_UNROLL
                for (int j = 0; j < kEights; ++j) {
                    if (j == kEights - 1 && !all) break;
                    const Pair pair = vector_at<const Pair>(from + 64 * j * eights);
                    rows[j].put(lane, 0, pair.at[0]);
                    rows[j].put(lane, 1, pair.at[1]);
                }
            });
            DOMERGE_UNROLL
            for (int i = 0; i < 2; ++i) DOMERGE_UNROLL
            for (int j = 0; j < kEights; ++j)
                if (j < kEights - 1 || all) add_product(sums[i][j], columns[i], rows[j]);
        }
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int i = 0; i < 2; ++i) DOMERGE_UNROLL
            for (int j = 0; j < kEights; ++j) DOMERGE_UNROLL
            for (int l = 0; l < 4; ++l) {
                const float sum = sums[i][j].of(lane)[l];
                mapped.of(lane)[i * 2 + l / 2] += sum * sum;
            }
        });
    }

    // The columns times factors.
    static DOMERGE_DEVICE void scale(float* a, int rank, const Each& factors) {
        each(a, rank, [&](int lane, int j, float& at) { at *= factors.of(lane)[j]; });
    }

    // visit(lane, j, at): all numbers of the columns.
    template <class Visit>
    static DOMERGE_DEVICE void each(float* a, int rank, Visit visit) {
        DOMERGE_ROLLED
        for (int k = 0; k < rank; k += 8)
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int i = 0; i < 2; ++i) {
                    const int row = k + lane % 4 + 4 * i;
                    DOMERGE_UNROLL
                    for (int j = 0; j < 4; ++j)
                        if (row < rank) visit(lane, j, a[row * kStride + lane / 4 + 8 * j]);
                }
            });
    }
};

}  // namespace domerge
