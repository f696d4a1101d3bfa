// C X, tile by tile: convert, multiply, convert, write; X itself without a tile between. X is read
// once.
#pragma once

#include "copy.h"
#include "kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kApplyColumns = 384;  // in rows: the X tile [R, 384]; a multiple of every panel
constexpr int64_t kApplyRows = 64;      // in columns: the X tile [64, R]

// A copy of a dense matrix with zero rows and columns up to a multiple of 16.
inline float* padded_copy(const float* in, int64_t rows, int64_t columns, int64_t ld,
                          Arena& arena) {
    float* out = take_matrix(arena, round_up(rows, 16), ld);
    for (int64_t i = 0; i < round_up(rows, 16); ++i)
        for (int64_t j = 0; j < ld; ++j)
            out[i * ld + j] = i < rows && j < columns ? in[i * columns + j] : 0.0f;
    return out;
}

// out [rows, n] = left [rows, depth] right [depth, n]
inline void multiply(const float* left, int64_t ld_left, const float* right, int64_t ld_right,
                     int64_t rows, int64_t depth, int64_t n, float* out, int64_t ld_out) {
    const auto all = [n](int64_t) { return n; };
    for_tiles<float>(pad_rows(rows), n, depth, all, [&](auto tile, int64_t i, int64_t j) {
        tile.clear();
        tile.template add_product<false>(left + i * ld_left, ld_left, right + j, ld_right, depth);
        tile.store_to(out + i * ld_out + j, ld_out);
    });
}

inline void write_rows(const float* tile, int64_t ld, int64_t rows, int64_t begin, int64_t n,
                       int64_t d, DType dtype, void* out, Watch& watch) {
    with_dtype(dtype, [&](auto format) {
        using Format = decltype(format);
        auto* to = static_cast<typename Format::Storage*>(out) + begin;
        Watch own = watch;
        for (int64_t i = 0; i < rows; ++i) write_row<Format>(tile + i * ld, n, to + i * d, own);
        watch = own;
    });
}

// C X for blocks in rows, a tile [rows, kLd] at a time; X itself without coefficients.
class RowProduct {
 public:
    static constexpr int64_t kLd = row_stride<float>(kApplyColumns);

    RowProduct(const ApplyItem& item, Arena& arena)
        : item_(item), x_(take_matrix(arena, item.problem->rank, kLd)) {
        if (!item.coefficients) return;
        c_ = padded_copy(item.coefficients, item.rows, item.problem->rank, ldc(), arena);
        y_ = take_matrix(arena, pad_rows(item.rows), kLd);
    }
    float* operator()(int64_t begin, int64_t n) {
        load_rows(*item_.problem, begin, n, x_, kLd, true);
        if (!c_) return x_;
        multiply(c_, ldc(), x_, kLd, item_.rows, item_.problem->rank, n, y_, kLd);
        return y_;
    }

 private:
    int64_t ldc() const { return row_stride<float>(item_.problem->rank); }
    const ApplyItem& item_;
    float* x_;
    float* c_ = nullptr;
    float* y_ = nullptr;
};

// The same transposed, for blocks in columns, with coefficients: tiles [kApplyRows, ld].
class ColumnProduct {
 public:
    ColumnProduct(const ApplyItem& item, Arena& arena)
        : item_(item), x_(take_matrix(arena, kApplyRows, ldx())) {
        const int64_t rank = item.problem->rank;
        const float* c = padded_copy(item.coefficients, item.rows, rank, ldx(), arena);
        c_ = take_matrix(arena, round_up(rank, 16), ldy());
        transpose(c, ldx(), round_up(item.rows, 16), round_up(rank, 16), c_, ldy());
        y_ = take_matrix(arena, kApplyRows, ldy());
    }
    int64_t ld() const { return ldy(); }
    float* operator()(int64_t begin, int64_t n) {
        load_columns(*item_.problem, begin, n, x_, ldx());
        multiply(x_, ldx(), c_, ldy(), n, item_.problem->rank, item_.rows, y_, ldy());
        return y_;
    }

 private:
    int64_t ldx() const { return row_stride<float>(round_up(item_.problem->rank, 16)); }
    int64_t ldy() const { return row_stride<float>(round_up(item_.rows, 16)); }
    const ApplyItem& item_;
    float* x_;
    float* c_;  // transposed
    float* y_;
};

// Rows [begin, begin + n) of the row-major [d, columns] output. Whole vectors are written: what
// they hold beyond a row is overwritten by the next row of the same item.
inline void write_columns(const float* tile, int64_t ld, int64_t columns, int64_t begin, int64_t n,
                          int64_t item_end, DType dtype, void* out, Watch& watch) {
    with_dtype(dtype, [&](auto format) {
        using Format = decltype(format);
        auto* to = static_cast<typename Format::Storage*>(out);
        Watch own = watch;
        for (int64_t c = 0; c < n; ++c) {
            const int64_t row = (begin + c) * columns;
            for (int64_t j = 0; j < columns; j += kWidth) {
                const FloatVec v = load<FloatVec>(tile + c * ld + j);
                own.add(v, columns - j);
                store_some<Format>(to + row + j, v, item_end * columns - row - j);
            }
        }
        watch = own;
    });
}

template <class Rows>
void apply_rows(const ApplyItem& item, Arena& arena, Watch& watch) {
    Rows product(item, arena);
    for (int64_t begin = item.begin; begin < item.end; begin += kApplyColumns) {
        poll();
        const int64_t n = least(item.end - begin, kApplyColumns);
        write_rows(product(begin, n), Rows::kLd, item.rows, begin, n, item.problem->d,
                   item.out_dtype, item.out, watch);
    }
}

template <class Columns>
void apply_columns(const ApplyItem& item, Arena& arena, Watch& watch) {
    Columns product(item, arena);
    for (int64_t begin = item.begin; begin < item.end; begin += kApplyRows) {
        poll();
        const int64_t n = least(item.end - begin, kApplyRows);
        write_columns(product(begin, n), product.ld(), item.rows, begin, n, item.end,
                      item.out_dtype, item.out, watch);
    }
}

template <class Rows, class Columns>
bool apply_item(const ApplyItem& item, Arena& arena) {
    Watch watch;
    if (!item.coefficients)
        copy_item(item, watch);
    else if (item.problem->columns)
        apply_columns<Columns>(item, arena, watch);
    else
        apply_rows<Rows>(item, arena, watch);
    return watch.finite(item.out_dtype);
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
