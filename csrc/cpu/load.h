// Reading blocks of any dtype into scaled float32 tiles, and writing tiles out.
#pragma once

#include "tile.h"
#include "watch.h"

namespace domerge {
namespace DOMERGE_ISA {

// Of a block in columns, how far ahead of its use a column is fetched: its neighbours in memory
// belong to other blocks, which no prefetcher expects.
constexpr int64_t kColumnsAhead = 64;

// tile [R, ld] = columns [begin, begin + n) of X; zero up to a whole vector. For blocks in rows.
inline void load_rows(const Problem& problem, int64_t begin, int64_t n, float* tile, int64_t ld,
                      bool scaled) {
    for (int64_t b = 0; b < problem.count; ++b) {
        const Block& block = problem.blocks[b];
        const float scale = scaled ? static_cast<float>(block.scale) : 1.0f;
        with_dtype(block.dtype, [&](auto format) {
            using Format = decltype(format);
            const auto* data = static_cast<const typename Format::Storage*>(block.data) + begin;
            for (int64_t i = 0; i < block.rank; ++i, data += block.pitch, tile += ld)
                for (int64_t c = 0; c < n; c += kWidth)
                    store(tile + c, load_some<Format>(data + c, n - c) * scale);
        });
    }
}

// to[0, n) = scale v, where whole vectors of T may be written.
DOMERGE_INLINE void store_scaled(float* to, FloatVec v, float scale, int64_t) {
    store(to, v * scale);
}

DOMERGE_INLINE void store_scaled(double* to, FloatVec v, double scale, int64_t n) {
    const Widened wide = widen(v);
    store(to, wide.low * scale);
    if (n > kLanes<double>) store(to + kLanes<double>, wide.high * scale);
}

// tile [n, ld] = the transpose of columns [begin, begin + n) of X. For blocks in columns. Whole
// vectors are written: what they hold beyond a block is overwritten by the next block, and beyond
// the last one it is padding, whose content is any finite or non-finite number.
template <class T>
void load_columns(const Problem& problem, int64_t begin, int64_t n, T* tile, int64_t ld) {
    for (int64_t b = 0; b < problem.count; ++b) {
        const Block& block = problem.blocks[b];
        const int64_t rank = block.rank, pitch = block.pitch;
        const T scale = static_cast<T>(block.scale);
        with_dtype(block.dtype, [&](auto format) {
            using Format = decltype(format);
            const auto* data = static_cast<const typename Format::Storage*>(block.data);
            const int64_t end = (problem.d - 1) * pitch + rank;
            for (int64_t c = 0; c < n; ++c) {
                const int64_t row = (begin + c) * pitch;
                __builtin_prefetch(data + row + kColumnsAhead * pitch);
                for (int64_t i = 0; i < rank; i += kWidth)
                    store_scaled(tile + c * ld + i,
                                 load_some<Format>(data + row + i, end - row - i), scale, rank - i);
            }
        });
        tile += block.rank;
    }
}

// out[0, n) = row[0, n) in the out dtype.
template <class Format>
DOMERGE_INLINE void write_row(const float* row, int64_t n, typename Format::Storage* out,
                              Watch& watch) {
    for (int64_t c = 0; c < n; c += kWidth) {
        const FloatVec v = load<FloatVec>(row + c);
        watch.add(v, n - c);
        store_some<Format>(out + c, v, n - c);
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
