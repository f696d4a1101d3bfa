// G = X X^T: columns of X are packed next to each other and added up as outer products.
#pragma once

#include "kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kGramDepth = 128;

struct Packed {
    float* values;  // [kGramDepth, ld]: columns of X, one after the other
    int64_t ld;
    float* tile;  // [R, ld_tile]: the same before its transposition, for blocks in rows
    int64_t ld_tile;
};

inline Packed take_packed(const Problem& problem, Arena& arena) {
    const int64_t ld = row_stride<float>(problem.rank), ld_tile = row_stride<float>(kGramDepth);
    const int64_t rows = problem.columns ? 0 : round_up(problem.rank, kWidth);
    return Packed{static_cast<float*>(arena.take(kGramDepth * ld * sizeof(float))), ld,
                  static_cast<float*>(arena.take(rows * ld_tile * sizeof(float))), ld_tile};
}

inline void pack_rows(const Problem& problem, int64_t begin, int64_t n, bool scaled,
                      const Packed& to) {
    load_rows(problem, begin, n, to.tile, to.ld_tile, scaled);
    transpose(to.tile, to.ld_tile, round_up(problem.rank, kWidth), round_up(n, kWidth), to.values,
              to.ld);
}

inline void pack(const Problem& problem, int64_t begin, int64_t n, const Packed& to) {
    if (problem.columns) return load_columns(problem, begin, n, to.values, to.ld);
    pack_rows(problem, begin, n, true, to);
}

// The same in double: converted exactly, then scaled, so no rounding comes before the products.
inline void pack_wide(const Problem& problem, int64_t begin, int64_t n, const Packed& through,
                      double* to, int64_t ld) {
    if (problem.columns) return load_columns(problem, begin, n, to, ld);
    pack_rows(problem, begin, n, false, through);
    for (int64_t c = 0; c < n; ++c) {
        const float* from = through.values + c * through.ld;
        for (int64_t b = 0, i = 0; b < problem.count; ++b)
            for (const int64_t end = i + problem.blocks[b].rank; i < end; ++i)
                to[c * ld + i] = problem.blocks[b].scale * from[i];
    }
}

// Each call's sums start at zero: many short sums lose less to rounding than one long one.
template <class T>
inline void add_products(const T* packed, int64_t ld, int64_t rank, int64_t depth, T* gram,
                         int64_t ld_gram) {
    const auto lower = [&](int64_t i) { return i + kTileRows < rank ? i + kTileRows : rank; };
    for_tiles<T>(pad_rows(rank), rank, depth, lower, [&](auto tile, int64_t i, int64_t j) {
        tile.clear();
        tile.template add_product<true>(packed + i, ld, packed + j, ld, depth);
        tile.add_to(gram + i * ld_gram + j, ld_gram);
    });
}

// sum [R, R] += X X^T (or = when `first`) over columns [begin, end), the lower triangle.
template <class T>
inline void gram_chunk(const Problem& problem, int64_t begin, int64_t end, bool first, T* sum,
                       Arena& arena) {
    constexpr bool wide = sizeof(T) == sizeof(double);
    const int64_t rank = problem.rank, rows = pad_rows(rank), ld = row_stride<T>(rank);
    T* chunk = static_cast<T*>(arena.take(rows * ld * sizeof(T)));
    for (int64_t i = 0; i < rows * ld; ++i) chunk[i] = 0;
    const Packed packed = take_packed(problem, arena);
    T* widened = wide ? static_cast<T*>(arena.take(kGramDepth * ld * sizeof(T))) : nullptr;
    for (int64_t c = begin; c < end; c += kGramDepth) {
        const int64_t n = end - c < kGramDepth ? end - c : kGramDepth;
        if constexpr (wide) {
            pack_wide(problem, c, n, packed, widened, ld);
            add_products(widened, ld, rank, n, chunk, ld);
        } else {
            pack(problem, c, n, packed);
            add_products(packed.values, packed.ld, rank, n, chunk, ld);
        }
    }
    for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j <= i; ++j)
            sum[i * rank + j] = chunk[i * ld + j] + (first ? T{0} : sum[i * rank + j]);
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
