// The one matrix product of this backend: a register tile of rows x vectors, its operands streamed
// from cache. All matrices are padded: rows to kTileRows, columns to a whole vector.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

// Tile shapes that fill the register file and leave room for the operands.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8, kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4, kTileVectors = 3;
#else
constexpr int kTileRows = 4, kTileVectors = 2;
#endif

constexpr int64_t kLeftBytes = 1 << 20;
constexpr int64_t kLongPanel = 1 << 14;  // numbers of a left operand that take microseconds
// How many rows before its use a row is fetched: of a right operand in L2, of factors in memory.
constexpr int64_t kRowsAhead = 8;

constexpr int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

constexpr int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}

constexpr int64_t pad_rows(int64_t n) {
    return round_up(n, kTileRows);
}

// Row stride of a scratch matrix of n columns: an odd number of cache lines, so that a column does
// not fall into a few cache sets, and at least one spare line, so that a vector written at any
// column stays inside its row.
template <class T>
constexpr int64_t row_stride(int64_t n) {
    constexpr int64_t line = 64 / sizeof(T);
    return ((round_up(n, line) / line + 1) | 1) * line;
}

DOMERGE_INLINE float* take_matrix(Arena& arena, int64_t rows, int64_t ld) {
    return static_cast<float*>(arena.take(rows * ld * sizeof(float)));
}

template <class T, int NV>
struct Tile {
    Vec<T> sum[kTileRows][NV];

    DOMERGE_INLINE void clear() {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) sum[i][j] = Vec<T>{};
    }

    // += A B, with A[i][k] at a[i * lda + k], or at a[k * lda + i] when Transposed.
    template <bool Transposed>
    DOMERGE_INLINE void add_product(const T* a, int64_t lda, const T* b, int64_t ldb,
                                    int64_t depth) {
        for (int64_t k = 0; k < depth; ++k, b += ldb) {
            Vec<T> row[NV];
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) {
                row[j] = load<Vec<T>>(b + j * kLanes<T>);
                if (!Transposed) __builtin_prefetch(b + kRowsAhead * ldb + j * kLanes<T>);
            }
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; ++i) {
                const T left = Transposed ? a[k * lda + i] : a[i * lda + k];
#pragma GCC unroll 8
                for (int j = 0; j < NV; ++j) sum[i][j] += row[j] * left;
            }
        }
    }

    DOMERGE_INLINE void store_to(T* c, int64_t ldc) const {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) store(c + i * ldc + j * kLanes<T>, sum[i][j]);
    }

    DOMERGE_INLINE void add_to(T* c, int64_t ldc) const {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < NV; ++j) {
                T* at = c + i * ldc + j * kLanes<T>;
                store(at, load<Vec<T>>(at) + sum[i][j]);
            }
    }
};

// Calls body(Tile<T, NV>{}, i, j) for the tiles at row i, column j that cover, for each strip of
// kTileRows rows, the first limit(i) columns; depth is that of the product. The right operand's
// panel of columns stays in L1 while the left operand streams from L2, in parts that fit there.
template <class T, class Limit, class Body>
DOMERGE_INLINE void for_tiles(int64_t rows, int64_t columns, int64_t depth, Limit limit,
                              Body body) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t part = pad_rows(kLeftBytes / static_cast<int64_t>(sizeof(T)) / depth + 1);
    for (int64_t begin = 0; begin < rows; begin += part) {
        const int64_t end = begin + part < rows ? begin + part : rows;
        for (int64_t j = 0, width; j < columns; j += width * lanes) {
            if (rows * depth >= kLongPanel) poll();
            // Two tiles of two vectors take less time than one of three and one of one.
            width = columns - j > 3 * lanes && columns - j <= 4 * lanes ? 2 : kTileVectors;
            for (int64_t i = begin; i < end; i += kTileRows) {
                const int64_t vectors = least((limit(i) - j + lanes - 1) / lanes, width);
                if (vectors == 3)
                    body(Tile<T, kTileVectors>{}, i, j);
                else if (vectors == 2)
                    body(Tile<T, 2>{}, i, j);
                else if (vectors == 1)
                    body(Tile<T, 1>{}, i, j);
            }
        }
    }
}

// out [columns, rows] = transpose of in [rows, columns]; both padded to whole vectors.
inline void transpose(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out,
                      int64_t ld_out) {
    for (int64_t i = 0; i < rows; i += kWidth) {
        for (int64_t j = 0; j < columns; j += kWidth) {
            FloatVec square[kWidth];
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k) {
                square[k] = load<FloatVec>(in + (i + k) * ld_in + j);
                __builtin_prefetch(in + (i + k) * ld_in + j + 2 * kWidth);
                __builtin_prefetch(out + (j + 2 * kWidth + k) * ld_out + i, 1);
            }
            transpose_square(square);
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k) store(out + (j + k) * ld_out + i, square[k]);
        }
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
