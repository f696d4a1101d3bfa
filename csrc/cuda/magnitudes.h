// ||S a|| and ||a|| of columns a of a matrix, S [rank, rank], on tensor cores at float32 accuracy.
#pragma once

#include "tf32.h"

namespace domerge {

// What a warp does to 32 columns of a row-major matrix, of which each row is kStride numbers.
template <int kStride>
struct Magnitudes {
    static_assert(kStride % 32 == 8);  // so that what lanes read is in different banks
    static constexpr int kColumns = 32;

    // Of columns g, g + 8, g + 16 and g + 24, lane 4 g + t.
    using Each = Fragment<float, 4>;
    Each mapped;  // ||S a||^2
    Each own;     // ||a||^2

    // visit(i, j, whether it is one, where it is): entry k + t + 4 i of every column j of a lane.
    template <class Visit>
    static DOMERGE_DEVICE void each(float* a, int rank, int lane, int k, Visit visit) {
        DOMERGE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int row = k + lane % 4 + 4 * i;
            float* const line = a + row * kStride + lane / 4;
            DOMERGE_UNROLL
            for (int j = 0; j < 4; ++j) visit(i, j, row < rank, line + 8 * j);
        }
    }

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
        add_quads(mapped);
        add_quads(own);
    }

    // Eight times kEights rows of S: what is read and split of the columns serves all of them.
    template <int kEights>
    DOMERGE_DEVICE void add_rows(const float* s, int rank, float* a, int row) {
        Sums16x8 sums[2][kEights];  // of 16 columns and 8 rows
        DOMERGE_UNROLL
        for (int i = 0; i < 2; ++i) DOMERGE_UNROLL
        for (int j = 0; j < kEights; ++j) clear(sums[i][j]);
        const bool all = row + 8 * (kEights - 1) < rank;
        DOMERGE_ROLLED
        for (int k = 0; k < rank; k += 8) {
            Parts<4> columns[2];
            Parts<2> rows[kEights];
            lanes([&](int lane) {
                each(a, rank, lane, k, [&](int i, int j, bool inside, const float* at) {
                    const float entry = inside ? *at : 0.0f;
                    columns[j / 2].put(lane, j % 2 + 2 * i, entry);
                    if (row == 0) own.of(lane)[j] += entry * entry;
                });
                DOMERGE_UNROLL
                for (int i = 0; i < 2 * kEights; ++i) {
                    const int r = row + 8 * (i / 2) + lane / 4, c = k + 4 * (i % 2) + lane % 4;
                    rows[i / 2].put(lane, i % 2, r < rank && c < rank ? s[r * rank + c] : 0.0f);
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
        DOMERGE_ROLLED
        for (int k = 0; k < rank; k += 8)
            lanes([&](int lane) {
                each(a, rank, lane, k, [&](int, int j, bool inside, float* at) {
                    if (inside) *at *= factors.of(lane)[j];
                });
            });
    }
};

}  // namespace domerge
