// Grams of bfloat16 factors on AMX tiles: exact products, float32 sums.
//
// A tile product multiplies rows of 32 numbers by rows of 16 pairs of numbers. So a panel of X is
// held twice: `left` row-major, and `right` transposed with two neighbours of a row in one 32-bit
// word. Each is a transposition of 32-bit words of the other, so a panel is read once.
#pragma once

#include "amx_tiles.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kPanel = 512;  // columns of X summed before they join the float32 total

struct Panel {
    uint16_t* left;  // [size, ld_left]
    int64_t ld_left;
    float* right;  // [kPanel / 2, ld_right], each a pair of numbers
    int64_t ld_right;
    float* left_words() const { return reinterpret_cast<float*>(left); }
};

// out [32, 32] = rows [i, i + 32) of left times columns [j, j + 32) of right.
inline void multiply_square(const Panel& panel, int64_t i, int64_t j, int64_t depth, float* out) {
    const int64_t left_bytes = panel.ld_left * 2, right_bytes = panel.ld_right * 4;
    const uint16_t* left = panel.left + i * panel.ld_left;
    const float* right = panel.right + j;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kDepth) {
        _tile_loadd(4, left + k, left_bytes);
        _tile_loadd(5, left + k + 16 * panel.ld_left, left_bytes);
        _tile_loadd(6, right + k / 2 * panel.ld_right, right_bytes);
        _tile_loadd(7, right + k / 2 * panel.ld_right + 16, right_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    constexpr int64_t bytes = kSquare * sizeof(float);
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + 16, bytes);
    _tile_stored(2, out + 16 * kSquare, bytes);
    _tile_stored(3, out + 16 * kSquare + 16, bytes);
}

// Columns [begin, begin + n) of blocks in rows; zero up to `depth`.
inline void pack_rows(const Problem& problem, int64_t begin, int64_t n, int64_t depth, int64_t size,
                      const Panel& panel) {
    uint16_t* to = panel.left;
    for (int64_t b = 0; b < problem.count; ++b) {
        const Block& block = problem.blocks[b];
        const auto* from = static_cast<const uint16_t*>(block.data) + begin;
        for (int64_t i = 0; i < block.rank; ++i, from += block.pitch, to += panel.ld_left) {
            __builtin_memcpy(to, from, n * 2);
            for (int64_t c = n; c < depth; ++c) to[c] = 0;
        }
    }
    transpose(panel.left_words(), panel.ld_left / 2, size, depth / 2, panel.right, panel.ld_right);
}

// Columns [begin, begin + n) of blocks in columns; zero up to `depth`. Whole vectors are written,
// as in load_columns.
inline void pack_columns(const Problem& problem, int64_t begin, int64_t n, int64_t depth,
                         int64_t size, const Panel& panel) {
    float* to = panel.right;
    for (int64_t b = 0; b < problem.count; to += problem.blocks[b].rank, ++b) {
        const Block& block = problem.blocks[b];
        const auto* data = static_cast<const uint16_t*>(block.data);
        const int64_t end = (problem.d - 1) * block.pitch + block.rank;
        for (int64_t c = 0; c < n; c += 2) {
            const int64_t row = (begin + c) * block.pitch;
            __builtin_prefetch(data + row + kColumnsAhead * block.pitch);
            for (int64_t i = 0; i < block.rank; i += kWidth) {
                const int64_t at = row + i, next = at + block.pitch;
                const FloatVec low = load_some<BFloat16>(data + at, end - at);
                const FloatVec high =
                    c + 1 < n ? load_some<BFloat16>(data + next, end - next) : FloatVec{};
                const BitsVec pair = bits<BitsVec>(low) >> 16 | bits<BitsVec>(high);
                store(to + c / 2 * panel.ld_right + i, pair);
            }
        }
    }
    for (int64_t c = round_up(n, 2) / 2; c < depth / 2; ++c)
        for (int64_t i = 0; i < size; i += kWidth)
            store(panel.right + c * panel.ld_right + i, FloatVec{});
    transpose(panel.right, panel.ld_right, depth / 2, size, panel.left_words(), panel.ld_left / 2);
}

// The lower squares of total [size, ld] += those of X X^T over one panel.
inline void add_panel(const Panel& panel, int64_t size, int64_t depth, float* total, int64_t ld) {
    alignas(64) float square[kSquare * kSquare];
    for (int64_t i = 0; i < size; i += kSquare) {
        for (int64_t j = 0; j <= i; j += kSquare) {
            multiply_square(panel, i, j, depth, square);
            for (int64_t r = 0; r < kSquare; ++r) {
                for (int64_t c = 0; c < kSquare; c += kWidth) {
                    float* at = total + (i + r) * ld + j + c;
                    store(at, load<FloatVec>(at) + load<FloatVec>(square + r * kSquare + c));
                }
            }
        }
    }
}

// total *= the blocks' scales. In place: fused with the addition that follows, the rounding would
// depend on how the sums are divided among threads.
inline void scale_lower(const Problem& problem, float* total, int64_t ld) {
    for (int64_t bi = 0, i = 0; bi < problem.count; ++bi) {
        for (const int64_t i_end = i + problem.blocks[bi].rank; i < i_end; ++i) {
            for (int64_t bj = 0, j = 0; bj <= bi; ++bj) {
                const double scale = problem.blocks[bi].scale * problem.blocks[bj].scale;
                for (const int64_t j_end = j + problem.blocks[bj].rank; j < j_end; ++j)
                    total[i * ld + j] *= static_cast<float>(scale);
            }
        }
    }
}

// As Kernels::gram, for a problem whose blocks are all bfloat16.
inline void gram_tiles(const Problem& problem, int64_t begin, int64_t end, bool first, float* sum,
                       Arena& arena) {
    const int64_t rank = problem.rank, size = round_up(rank, kSquare), ld = row_stride<float>(size);
    const auto take = [&](int64_t words) {
        float* piece = static_cast<float*>(arena.take(words * sizeof(float)));
        for (int64_t i = 0; i < words; ++i) piece[i] = 0.0f;
        return piece;
    };
    const int64_t ld_left = 2 * row_stride<float>(kPanel / 2);
    const Panel panel{reinterpret_cast<uint16_t*>(take(size * ld_left / 2)), ld_left,
                      take(kPanel / 2 * ld), ld};
    float* total = take(size * ld);
    const Tiles tiles;
    for (int64_t c = begin; c < end; c += kPanel) {
        poll();
        const int64_t n = end - c < kPanel ? end - c : kPanel, depth = round_up(n, kDepth);
        if (problem.columns)
            pack_columns(problem, c, n, depth, size, panel);
        else
            pack_rows(problem, c, n, depth, size, panel);
        add_panel(panel, size, depth, total, ld);
    }
    scale_lower(problem, total, ld);
    for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j <= i; ++j)
            sum[i * rank + j] = total[i * ld + j] + (first ? 0.0f : sum[i * rank + j]);
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
