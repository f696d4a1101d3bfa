// C X of bfloat16 factors on AMX tiles. C, with the blocks' scales in it, is split into three
// bfloat16 parts whose sum it is to 2^-25; the products are exact, the sums float32.
#pragma once

#include "amx_tiles.h"
#include "apply.h"

namespace domerge {
namespace DOMERGE_ISA {

inline int parts_for(DType out) {
    return out == DType::float32 ? 3 : 2;
}

// C [rows, R] with the scales, as bfloat16 matrices [rows, depth] of whole tiles one after the
// other, zero beyond its rows and columns.
struct Parts {
    int count;
    int64_t rows;
    int64_t depth;
    uint16_t* data;

    int64_t size() const { return rows * depth; }
};

inline Parts split(const ApplyItem& item, Arena& arena) {
    const Problem& problem = *item.problem;
    const int64_t rank = problem.rank;
    Parts parts{parts_for(item.out_dtype), round_up(item.rows, kSquare), round_up(rank, kDepth),
                nullptr};
    parts.data = static_cast<uint16_t*>(arena.take(parts.count * parts.size() * 2));
    float* scales = take_matrix(arena, 1, parts.depth);
    for (int64_t k = 0; k < parts.depth; ++k) scales[k] = 0.0f;
    for (int64_t b = 0, k = 0; b < problem.count; ++b)
        for (const int64_t end = k + problem.blocks[b].rank; k < end; ++k)
            scales[k] = static_cast<float>(problem.blocks[b].scale);
    for (int64_t i = 0; i < parts.rows; ++i) {
        const float* row = item.coefficients + i * rank;
        for (int64_t k = 0; k < parts.depth; k += kWidth) {
            const int64_t n = i < item.rows && k < rank ? rank - k : 0;
            FloatVec rest = load_some<Float32>(row + k, n) * load<FloatVec>(scales + k);
            for (int p = 0; p < parts.count; ++p) {
                uint16_t* to = parts.data + p * parts.size() + i * parts.depth + k;
                BFloat16::store(to, rest);
                rest -= BFloat16::load(to);
            }
        }
    }
    return parts;
}

// The square of sums at (i, j) of left right, where either side comes in parts: the left's are
// left_part elements apart, the right's right_part; the other side's distance is 0. A row of
// `right` holds pairs, one in a 32-bit word.
struct Operands {
    int parts;
    const uint16_t* left;
    int64_t ld_left, left_part;
    const uint32_t* right;
    int64_t ld_right, right_part;
};

inline void multiply_parts(const Operands& x, int64_t i, int64_t j, int64_t depth, float* out,
                           int64_t ld_out) {
    const int64_t left_bytes = x.ld_left * 2, right_bytes = x.ld_right * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kDepth) {
        for (int p = 0; p < x.parts; ++p) {
            if (p == 0 || x.left_part) {
                const uint16_t* left = x.left + p * x.left_part + i * x.ld_left + k;
                _tile_loadd(4, left, left_bytes);
                _tile_loadd(5, left + kTile * x.ld_left, left_bytes);
            }
            if (p == 0 || x.right_part) {
                const uint32_t* right = x.right + p * x.right_part + k / 2 * x.ld_right + j;
                _tile_loadd(6, right, right_bytes);
                _tile_loadd(7, right + kTile, right_bytes);
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    float* to = out + i * ld_out + j;
    _tile_stored(0, to, ld_out * 4);
    _tile_stored(1, to + kTile, ld_out * 4);
    _tile_stored(2, to + kTile * ld_out, ld_out * 4);
    _tile_stored(3, to + kTile * ld_out + kTile, ld_out * 4);
}

// Both rows, a column's two numbers in one word: 32 of them.
inline void store_pairs(__m512i even, __m512i odd, uint32_t* to) {
    alignas(64) static constexpr uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                     37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                     11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(low);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, second, odd));
}

// As RowProduct, for bfloat16 blocks and coefficients.
class TileRowProduct {
 public:
    static constexpr int64_t kLd = RowProduct::kLd;

    TileRowProduct(const ApplyItem& item, Arena& arena)
        : problem_(*item.problem),
          parts_(split(item, arena)),
          lines_(static_cast<Line*>(arena.take(problem_.rank * sizeof(Line)))),
          x_(static_cast<uint32_t*>(arena.take(parts_.depth / 2 * kLd * 4))),
          y_(take_matrix(arena, parts_.rows, kLd)) {
        Line* line = lines_;
        for (int64_t b = 0; b < problem_.count; ++b) {
            const Block& block = problem_.blocks[b];
            for (int64_t i = 0; i < block.rank; ++i)
                *line++ = static_cast<Line>(block.data) + i * block.pitch;
        }
    }
    float* operator()(int64_t begin, int64_t n) {
        pack(begin, n);
        const Operands operands{parts_.count, parts_.data, parts_.depth, parts_.size(), x_, kLd, 0};
        for (int64_t j = 0; j < n; j += kSquare)
            for (int64_t i = 0; i < parts_.rows; i += kSquare)
                multiply_parts(operands, i, j, parts_.depth, y_, kLd);
        return y_;
    }

 private:
    using Line = const uint16_t*;

    // Zero up to whole tiles.
    void pack(int64_t begin, int64_t n) {
        for (int64_t k = 0; k < parts_.depth; k += 2) {
            for (int64_t c = 0; c < n; c += kDepth) {
                const uint32_t mask = n - c >= kDepth ? ~0u : (1u << (n - c)) - 1;
                const auto read = [&](int64_t row) {
                    return row < problem_.rank
                               ? _mm512_maskz_loadu_epi16(mask, lines_[row] + begin + c)
                               : _mm512_setzero_si512();
                };
                store_pairs(read(k), read(k + 1), x_ + k / 2 * kLd + c);
                if (k + kRowsAhead < problem_.rank) {
                    __builtin_prefetch(lines_[k + kRowsAhead - 1] + begin + c);
                    __builtin_prefetch(lines_[k + kRowsAhead] + begin + c);
                }
            }
        }
    }

    const Problem& problem_;
    const Parts parts_;
    Line* lines_;
    uint32_t* x_;
    float* y_;
    const Tiles tiles_;
};

// As ColumnProduct, for bfloat16 blocks and coefficients.
class TileColumnProduct {
 public:
    TileColumnProduct(const ApplyItem& item, Arena& arena)
        : problem_(*item.problem),
          parts_(split(item, arena)),
          c_(static_cast<uint32_t*>(arena.take(parts_.count * part_size() * 4))),
          x_(static_cast<uint16_t*>(arena.take(kApplyRows * ldx() * 2))),
          y_(take_matrix(arena, kApplyRows, ld())) {
        for (int p = 0; p < parts_.count; ++p)
            transpose(reinterpret_cast<const float*>(parts_.data + p * parts_.size()),
                      parts_.depth / 2, parts_.rows, parts_.depth / 2,
                      reinterpret_cast<float*>(c_ + p * part_size()), ld());
    }
    int64_t ld() const { return row_stride<float>(parts_.rows); }
    float* operator()(int64_t begin, int64_t n) {
        pack(begin, n);
        const Operands operands{parts_.count, x_, ldx(), 0, c_, ld(), part_size()};
        for (int64_t j = 0; j < parts_.rows; j += kSquare)
            for (int64_t i = 0; i < n; i += kSquare)
                multiply_parts(operands, i, j, parts_.depth, y_, ld());
        return y_;
    }

 private:
    int64_t ldx() const { return 2 * row_stride<float>(parts_.depth / 2); }
    int64_t part_size() const { return parts_.depth / 2 * ld(); }

    // Whole vectors are written, as in load_columns; zero beyond the rank.
    void pack(int64_t begin, int64_t n) {
        const int64_t ld = ldx(), rank = problem_.rank, depth = parts_.depth;
        uint16_t* to = x_;
        for (int64_t b = 0; b < problem_.count; to += problem_.blocks[b].rank, ++b) {
            const Block block = problem_.blocks[b];
            const auto* data = static_cast<const uint16_t*>(block.data) + begin * block.pitch;
            const int64_t end = (problem_.d - 1 - begin) * block.pitch + block.rank;
            for (int64_t c = 0; c < n; ++c) {
                __builtin_prefetch(data + (c + kColumnsAhead) * block.pitch);
                for (int64_t i = 0; i < block.rank; i += kTile) {
                    const int64_t at = c * block.pitch + i;
                    const __mmask16 mask = end - at >= kTile ? 0xffff : (1u << (end - at)) - 1;
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * ld + i),
                                        _mm256_maskz_loadu_epi16(mask, data + at));
                }
            }
        }
        for (int64_t c = 0; c < n; ++c)
            for (int64_t i = rank; i < depth; ++i) x_[c * ld + i] = 0;
    }

    const Problem& problem_;
    const Parts parts_;
    uint32_t* c_;  // the parts transposed, two neighbours of a row in a word
    uint16_t* x_;
    float* y_;
    const Tiles tiles_;
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
