// C A, the columns' magnitudes, the merged magnitude and the rescaling, in one pass over A.
#pragma once

#include "apply.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr float kZeroColumn = 1e-6f;

inline int64_t root_rows(int64_t rank) {
    return pad_rows(rank);
}
inline int64_t root_stride(int64_t rank) {
    return row_stride<float>(rank);
}

// Cholesky with diagonal pivoting, in double; stops where what is left is rounding. Semidefinite
// matrices, zero and duplicated columns included, need no special case.
inline Root make_root(const double* matrix, int64_t rank, float* data, Arena& arena) {
    const int64_t ld = root_stride(rank), rows = root_rows(rank);
    double* s = static_cast<double*>(arena.take((rank + 1) * rank * sizeof(double)));
    double* left = s + rank * rank;
    double trace = 0.0;
    for (int64_t i = 0; i < rank; ++i) trace += left[i] = matrix[i * rank + i];
    for (int64_t i = 0; i < rows * ld; ++i) data[i] = 0.0f;
    if (!(trace > 0.0)) return Root{data, 0, ld, 0.0f};
    const double norm = __builtin_sqrt(trace), negligible = 1e-16 * rank * trace;
    int64_t k = 0;
    for (; k < rank; ++k) {
        poll();
        int64_t pivot = 0;
        for (int64_t i = 1; i < rank; ++i)
            if (left[i] > left[pivot]) pivot = i;
        if (!(left[pivot] > negligible)) break;
        double* row = s + k * rank;
        for (int64_t i = 0; i < rank; ++i) row[i] = matrix[pivot * rank + i];
        for (int64_t m = 0; m < k; ++m) {
            const double factor = s[m * rank + pivot];
            for (int64_t i = 0; i < rank; ++i) row[i] -= factor * s[m * rank + i];
        }
        const double inverse = 1.0 / __builtin_sqrt(left[pivot]);
        for (int64_t i = 0; i < rank; ++i) {
            row[i] = left[i] < 0.0 ? 0.0 : row[i] * inverse;
            left[i] -= row[i] * row[i];
            data[k * ld + i] = static_cast<float>(row[i] / norm);
        }
        left[pivot] = -1.0;  // used up: later rows are zero here
    }
    return Root{data, pad_rows(k), ld, static_cast<float>(norm)};
}

// squares[c] = || S a_c ||^2 / norm^2 for the columns a_c of a [rank, n]
inline void root_norms(const Root& root, int64_t rank, const float* a, int64_t ld, int64_t n,
                       float* squares) {
    for (int64_t c = 0; c < round_up(n, kWidth); ++c) squares[c] = 0.0f;
    if (rank < kTileRows) {  // a tile would be mostly padding
        for (int64_t c = 0; c < n; c += kWidth) {
            FloatVec sum{};
            for (int64_t i = 0; i < rank; ++i) {
                FloatVec entry{};
                for (int64_t k = 0; k < rank; ++k)
                    entry += load<FloatVec>(a + k * ld + c) * root.data[i * root.stride + k];
                sum += entry * entry;
            }
            store(squares + c, sum);
        }
        return;
    }
    const auto all = [n](int64_t) { return n; };
    for_tiles<float>(root.rows, n, rank, all, [&](auto tile, int64_t i, int64_t j) {
        constexpr int vectors = sizeof(tile.sum[0]) / sizeof(FloatVec);
        tile.clear();
        tile.template add_product<false>(root.data + i * root.stride, root.stride, a + j, ld, rank);
        for (int v = 0; v < vectors; ++v) {
            FloatVec sum = load<FloatVec>(squares + j + v * kWidth);
#pragma GCC unroll 8
            for (int k = 0; k < kTileRows; ++k) sum += tile.sum[k][v] * tile.sum[k][v];
            store(squares + j + v * kWidth, sum);
        }
    });
}

struct DecoupleTile {
    float* values;      // [R, ld]: C A, then A'
    float* magnitudes;  // [count, ld]
    float* merged;      // [ld]: the merged magnitude
    float* counted;     // [ld]: sum of |omega| over adapters whose column is not zero
    float* squares;     // [ld]
    int64_t ld;
};

// Fills magnitudes, merged and counted, and adds to the energies.
inline void find_magnitudes(const DecoupleItem& item, const DecoupleTile& t, int64_t n) {
    const Problem& problem = *item.apply.problem;
    const float* a = t.values;
    for (int64_t c = 0; c < t.ld; ++c) t.merged[c] = t.counted[c] = 0.0f;
    for (int64_t b = 0; b < problem.count; a += problem.blocks[b].rank * t.ld, ++b) {
        const int64_t rank = problem.blocks[b].rank;
        const float weight = static_cast<float>(__builtin_fabs(item.omegas[b]));
        root_norms(item.roots[b], rank, a, t.ld, n, t.squares);
        FloatVec energy{};
        for (int64_t c = 0; c < n; c += kWidth) {
            FloatVec own{};
            for (int64_t i = 0; i < rank; ++i) {
                const FloatVec value = load<FloatVec>(a + i * t.ld + c);
                own += value * value;
            }
            const FloatVec relative = square_root(load<FloatVec>(t.squares + c));
            const IndexVec live = relative > square_root(own) * kZeroColumn;
            const FloatVec magnitude = where(live, relative * item.roots[b].norm, FloatVec{});
            energy += magnitude * magnitude;
            store(t.magnitudes + b * t.ld + c, magnitude);
            store(t.merged + c, load<FloatVec>(t.merged + c) + magnitude * weight);
            store(t.counted + c,
                  load<FloatVec>(t.counted + c) + where(live, FloatVec{} + weight, FloatVec{}));
        }
        item.energies[b] += sum_lanes(energy);
    }
}

// values_i *= omega_i / magnitude_i, times scale and the merged magnitude; or times the norm of B_i
// for `directions`, so that adapters of very different sizes fit into one float32 product.
inline void rescale(const DecoupleItem& item, const DecoupleTile& t, int64_t n, bool directions) {
    const Problem& problem = *item.apply.problem;
    float* a = t.values;
    for (int64_t b = 0; b < problem.count; a += problem.blocks[b].rank * t.ld, ++b) {
        const float weight =
            static_cast<float>(directions ? item.omegas[b] : item.omegas[b] * item.scale);
        for (int64_t c = 0; c < n; c += kWidth) {
            const FloatVec magnitude = load<FloatVec>(t.magnitudes + b * t.ld + c);
            const FloatVec target =
                directions ? FloatVec{} + item.roots[b].norm : load<FloatVec>(t.merged + c);
            const FloatVec factor =
                where(magnitude > FloatVec{}, target / magnitude * weight, FloatVec{});
            for (int64_t i = 0; i < problem.blocks[b].rank; ++i)
                store(a + i * t.ld + c, load<FloatVec>(a + i * t.ld + c) * factor);
        }
    }
}

// values_i *= scale / norm of B_i * merged / norm of the merged direction
inline void renormalize(const DecoupleItem& item, const DecoupleTile& t, int64_t n) {
    const Problem& problem = *item.apply.problem;
    root_norms(*item.full, problem.rank, t.values, t.ld, n, t.squares);
    for (int64_t c = 0; c < n; c += kWidth) {
        const FloatVec norm = square_root(load<FloatVec>(t.squares + c)) * item.full->norm;
        const IndexVec live = norm > load<FloatVec>(t.counted + c) * kZeroColumn;
        store(t.merged + c, where(live, load<FloatVec>(t.merged + c) / norm, FloatVec{}));
    }
    float* a = t.values;
    for (int64_t b = 0; b < problem.count; a += problem.blocks[b].rank * t.ld, ++b) {
        const float size = item.roots[b].norm;
        const float gain = size > 0 ? static_cast<float>(item.scale / size) : 0.0f;
        for (int64_t c = 0; c < n; c += kWidth) {
            const FloatVec factor = load<FloatVec>(t.merged + c) * gain;
            for (int64_t i = 0; i < problem.blocks[b].rank; ++i)
                store(a + i * t.ld + c, load<FloatVec>(a + i * t.ld + c) * factor);
        }
    }
}

template <class Rows>
bool apply_decouple_item(const DecoupleItem& item, Arena& arena) {
    const ApplyItem& apply = item.apply;
    const Problem& problem = *apply.problem;
    constexpr int64_t ld = Rows::kLd;
    DecoupleTile t{nullptr,
                   take_matrix(arena, problem.count, ld),
                   take_matrix(arena, 1, ld),
                   take_matrix(arena, 1, ld),
                   take_matrix(arena, 1, ld),
                   ld};
    Rows product(apply, arena);
    Watch watch;
    for (int64_t begin = apply.begin; begin < apply.end; begin += kApplyColumns) {
        poll();
        const int64_t n = least(apply.end - begin, kApplyColumns);
        t.values = product(begin, n);
        find_magnitudes(item, t, n);
        rescale(item, t, n, item.full != nullptr);
        if (item.full) renormalize(item, t, n);
        write_rows(t.values, ld, problem.rank, begin, n, problem.d, apply.out_dtype, apply.out,
                   watch);
    }
    return watch.finite(apply.out_dtype);
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
