// The updates s_i B_i A_i of a module, a strip of rows by a panel of columns at a time.
#pragma once

#include "apply.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kPanel = 96;               // whole tiles and whole draws on any instruction set
constexpr int64_t kStripBytes = 24 << 10;    // a strip of all updates, which stays in L1
constexpr int64_t kFactorBytes = 256 << 10;  // the panel of all A_i, which stays in L2

static_assert(kPanel % (kTileVectors * kWidth) == 0 && kPanel % (2 * kWidth) == 0, "kPanel");

// A tile of every update: rows [row, row + rows), columns [column, column + n).
struct Strip {
    float* tiles;  // [count, kTileRows, ld]; zero from n up to a whole vector
    int64_t ld;
    int64_t row;
    int64_t rows;
    int64_t column;
    int64_t n;

    float* of(int64_t adapter, int64_t i) const { return tiles + (adapter * kTileRows + i) * ld; }
    int64_t stride() const { return kTileRows * ld; }
};

// tau [kTileRows, NV vectors] = scale (B A), with B[i][k] at b[k * ldb + i]: every entry by fused
// operations in the order of k, so that it does not depend on the tile.
template <int NV>
DOMERGE_INLINE void update_tile(const float* b, int64_t ldb, const float* a, int64_t lda,
                                int64_t depth, float scale, float* tau, int64_t ld) {
    FloatVec sum[kTileRows][NV] = {};
    for (int64_t k = 0; k < depth; ++k, a += lda, b += ldb) {
        FloatVec row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) row[j] = load<FloatVec>(a + j * kWidth);
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i) {
            const FloatVec left = broadcast(b[i]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) sum[i][j] = multiply_add(left, row[j], sum[i][j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) store(tau + i * ld + j * kWidth, sum[i][j] * scale);
}

class Updates {
 public:
    // whole: panels of all columns.
    Updates(const UpdateItem& item, bool whole, Arena& arena)
        : item_(item), count_(item.a->count), width_(panel(whole)), ld_(row_stride<float>(width_)) {
        ld_b_ = row_stride<float>(round_up(item.end - item.begin, 16));
        b_ = take_matrix(arena, item.b->rank + 16, ld_b_);
        a_ = take_matrix(arena, item.a->rank, ld_);
        tiles_ = take_matrix(arena, count_ * kTileRows, ld_);
        float* b = b_;
        for (int64_t i = 0; i < count_; b += item.b->blocks[i++].rank * ld_b_) load_b(i, b, arena);
    }

    int64_t width() const { return width_; }

    // body(Strip) for all of the item.
    template <class Body>
    void for_strips(Body body) {
        const int64_t d = item_.a->d;
        for (int64_t column = 0; column < d; column += width_) {
            const int64_t n = least(width_, d - column);
            load_rows(*item_.a, column, n, a_, ld_, false);
            for (int64_t row = item_.begin; row < item_.end; row += kTileRows) {
                poll();
                multiply_strip(row - item_.begin, n);
                const int64_t rows = least(kTileRows, item_.end - row);
                body(Strip{tiles_, ld_, row, rows, column, n});
            }
        }
    }

 private:
    int64_t panel(bool whole) const {
        const int64_t all = round_up(item_.a->d, kPanel);
        if (whole) return all;
        const int64_t float_bytes = sizeof(float);
        const int64_t fit = least(kStripBytes / (count_ * kTileRows * float_bytes),
                                  kFactorBytes / (item_.a->rank * float_bytes));
        return least(all, fit < kPanel ? kPanel : fit / kPanel * kPanel);
    }

    // b [r_i, ld_b_] = the item's columns of B_i^T, not scaled; zero up to a whole strip.
    void load_b(int64_t i, float* b, Arena& arena) {
        Block block = item_.b->blocks[i];
        block.scale = 1.0;
        const Problem problem{&block, 1, block.rank, item_.b->d, item_.b->columns};
        const int64_t n = item_.end - item_.begin;
        if (!problem.columns) {
            load_rows(problem, item_.begin, n, b, ld_b_, false);
            for (int64_t k = 0; k < block.rank; ++k)
                for (int64_t j = round_up(n, kWidth); j < pad_rows(n); ++j) b[k * ld_b_ + j] = 0.0f;
            return;
        }
        const int64_t ld = row_stride<float>(round_up(block.rank, 16));
        float* rows = take_matrix(arena, round_up(n, 16), ld);
        load_columns(problem, item_.begin, n, rows, ld);
        for (int64_t k = n * ld; k < round_up(n, 16) * ld; ++k) rows[k] = 0.0f;
        transpose(rows, ld, round_up(n, 16), round_up(block.rank, 16), b, ld_b_);
    }

    void multiply_strip(int64_t row, int64_t n) {
        const float* a = a_;
        const float* b = b_ + row;
        float* tau = tiles_;
        for (int64_t i = 0; i < count_; ++i, tau += kTileRows * ld_) {
            const Block& block = item_.b->blocks[i];
            const float scale = static_cast<float>(block.scale);
            for (int64_t j = 0; j < n; j += kTileVectors * kWidth) {
                const auto tile = [&](auto vectors) {
                    update_tile<decltype(vectors)::value>(b, ld_b_, a + j, ld_, block.rank, scale,
                                                          tau + j, ld_);
                };
                if (n - j > 2 * kWidth && kTileVectors == 3)
                    tile(std::integral_constant<int, kTileVectors>{});
                else if (n - j > kWidth)
                    tile(std::integral_constant<int, 2>{});
                else
                    tile(std::integral_constant<int, 1>{});
            }
            a += block.rank * ld_;
            b += block.rank * ld_b_;
        }
    }

    const UpdateItem& item_;
    int64_t count_;
    int64_t width_;
    int64_t ld_;
    int64_t ld_b_;
    float* b_;      // B_i^T, one after the other
    float* a_;      // the panel of all A_i
    float* tiles_;  // [count, kTileRows, ld]
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
