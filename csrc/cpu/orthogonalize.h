// The descent on R x R matrices, one problem at a time, all of its state in this core's cache.
//
// Stored transposed where that makes every product a plain or a transposed-left one: with Ct = C^T,
// M = V o H and Q = D G,  Pt = (Ct M + 2 gamma (Ct - I)) K^-1,  Qt = G Dt,  E = Qt^T Ct + Ct^T Qt,
// F = Qt^T Dt, where K are the curvatures of all rows, which precondition them. H, E and F are kept
// only where they are used: below the diagonal blocks. What lies beyond a matrix in its last
// vectors and tiles is zero: sums run over it.
#pragma once

#include "descent_pairs.h"
#include "descent_state.h"
#include "tile.h"

namespace domerge {
namespace DOMERGE_ISA {

// Above it the left operand of a product is read along its rows, which the prefetcher follows.
constexpr int64_t kDownColumns = 256;

// <A, B>_G = tr(A G B^T), kept up to date instead of being computed anew.
struct Products {
    double kpp, kp_old_p, kp_d;  // of the gradient K P with P, the last P, and D
    double pp, p_d, p_change;    // of P with P, D, and C - I
    double dd, d_change;         // of D with D and with C - I
};

// out = M = V o H, both triangles.
inline void weigh(const Matrices& m, const Segments& s, float* out) {
    for (int64_t i = 0; i < m.columns; i += kWidth) {
        for (int64_t j = 0; j <= i; j += kWidth) {
            FloatVec square[kWidth], flipped[kWidth];
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k) {
                const int64_t row = i + k < m.rank ? i + k : m.rank - 1;
                const FloatVec v = load<FloatVec>(m.weight + s.of_row[row] * m.ld + j);
                square[k] = flipped[k] = load<FloatVec>(m.h + (i + k) * m.ld + j) * v;
            }
            transpose_square(flipped);
#pragma GCC unroll 16
            for (int k = 0; k < kWidth; ++k) {
                store(out + (i + k) * m.ld + j, i == j ? square[k] + flipped[k] : square[k]);
                if (i != j) store(out + (j + k) * m.ld + i, flipped[k]);
            }
        }
    }
}

// The curvatures along the rows of X_i, from M = V o G: that of the penalty is
// sum_j V_ij ||G_ij||^2 / n_i^2.
inline void find_curvatures(const Matrices& m, const Segments& s, const float* weighed,
                            double gamma) {
    double largest = 0;
    for (int64_t j = 0; j < s.count; ++j) {
        double sum = 0;
        for (int64_t i = s.start[j]; i < s.start[j + 1]; ++i) {
            FloatVec part{};
            for (int64_t c = 0; c < m.columns; c += kWidth)
                part +=
                    load<FloatVec>(weighed + i * m.ld + c) * load<FloatVec>(m.gram + i * m.ld + c);
            sum += sum_lanes(part);
        }
        const double norm = s.factor_norm[j], mean = norm > 0 ? sum / (norm * norm) : 0.0;
        if (mean > largest) largest = mean;
        m.sums[j] = mean;
    }
    for (int64_t i = 0; i < m.rank; ++i) {
        const double k = bounded_curvature(m.sums[s.of_row[i]], largest, gamma);
        m.curvature[i] = static_cast<float>(k);
        m.step[i] = k > 0 ? static_cast<float>(1 / k) : 0.0f;
    }
}

// Pt K^-1
inline void precondition(const Matrices& m) {
    for (int64_t i = 0; i < m.rank; ++i)
        for (int64_t j = 0; j < m.columns; j += kWidth) {
            float* at = m.pt + i * m.ld + j;
            store(at, load<FloatVec>(at) * load<FloatVec>(m.step + j));
        }
}

// Pt K = Ct M + 2 gamma (Ct - I) = M + (Ct - I) M + 2 gamma (Ct - I), of ct = Ct - I.
inline void find_gradient(const Matrices& m, double gamma) {
    const float pull = static_cast<float>(2 * gamma);
    const auto all = [&](int64_t) { return m.columns; };
    for_tiles<float>(m.rows, m.columns, m.rank, all, [&](auto tile, int64_t i, int64_t j) {
        constexpr int vectors = sizeof(tile.sum[0]) / sizeof(FloatVec);
#pragma GCC unroll 8
        for (int k = 0; k < kTileRows; ++k)
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v) {
                const int64_t at = (i + k) * m.ld + j + v * kWidth;
                tile.sum[k][v] = load<FloatVec>(m.m + at) + load<FloatVec>(m.ct + at) * pull;
            }
        tile.template add_product<false>(m.ct + i * m.ld, m.ld, m.m + j, m.ld, m.rank);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            const FloatVec step = load<FloatVec>(m.step + j + v * kWidth);
#pragma GCC unroll 8
            for (int k = 0; k < kTileRows; ++k) tile.sum[k][v] *= step;
        }
        tile.store_to(m.pt + i * m.ld + j, m.ld);
    });
}

// Adds rows [i, i + kTileRows) of L Y to the tile at y: L is `along`, its transpose is `down`.
template <class T>
DOMERGE_INLINE void add_product(const Matrices& m, T& tile, const float* along, const float* down,
                                int64_t i, const float* y) {
    if (m.rank > kDownColumns)
        tile.template add_product<false>(along + i * m.ld, m.ld, y, m.ld, m.rank);
    else
        tile.template add_product<true>(down + i, m.ld, y, m.ld, m.rank);
}

// Qpt = G Pt, and the products of P with what is known, of ct = Ct - I; `kFirst`: C = I, D = 0.
template <bool kFirst>
inline void find_gradient_products(const Matrices& m, Products& products) {
    constexpr int sums = kFirst ? 2 : 6;
    double sum[6] = {};
    const auto all = [&](int64_t) { return m.columns; };
    for_tiles<float>(m.rows, m.columns, m.rank, all, [&](auto tile, int64_t i, int64_t j) {
        constexpr int vectors = sizeof(tile.sum[0]) / sizeof(FloatVec);
        tile.clear();
        add_product(m, tile, m.gram, m.gram, i, m.pt + j);
        tile.store_to(m.qpt + i * m.ld + j, m.ld);
        FloatVec part[sums] = {};
        for (int k = 0; k < kTileRows; ++k) {
            for (int v = 0; v < vectors; ++v) {
                const int64_t at = (i + k) * m.ld + j + v * kWidth;
                const FloatVec q = load<FloatVec>(m.qpt + at);
                const FloatVec kq = q * load<FloatVec>(m.curvature + j + v * kWidth);
                const FloatVec p = load<FloatVec>(m.pt + at);
                part[0] += kq * p;
                part[1] += q * p;
                if constexpr (!kFirst) {
                    const FloatVec d = load<FloatVec>(m.dt + at);
                    part[2] += kq * load<FloatVec>(m.pt_old + at);
                    part[3] += kq * d;
                    part[4] += q * d;
                    part[5] += q * load<FloatVec>(m.ct + at);
                }
            }
        }
        for (int k = 0; k < sums; ++k) sum[k] += sum_lanes(part[k]);
    });
    products.kpp = sum[0];
    products.pp = sum[1];
    products.kp_old_p = sum[2];
    products.kp_d = sum[3];
    products.p_d = sum[4];
    products.p_change = sum[5];
}

// D = -P + beta D by Polak and Ribiere, and Q = D G by the same recurrence; `kFirst`: beta = 0.
template <bool kFirst>
inline void turn(const Matrices& m, Products& products, double kpp_old) {
    double beta = kpp_old > 0 ? (products.kpp - products.kp_old_p) / kpp_old : 0.0;
    if (!(beta > 0) || -products.kpp + beta * products.kp_d >= 0) beta = 0;
    products.dd = products.pp - 2 * beta * products.p_d + beta * beta * products.dd;
    products.d_change = -products.p_change + beta * products.d_change;
    const float b = static_cast<float>(beta);
    const auto turned = [&](const float* old, const float* gradient) {
        const FloatVec g = load<FloatVec>(gradient);
        return kFirst ? -g : load<FloatVec>(old) * b - g;
    };
    for (int64_t i = 0; i < m.rank; ++i) {
        for (int64_t j = 0; j < m.columns; j += kWidth) {
            const int64_t at = i * m.ld + j;
            store(m.dt + at, turned(m.dt + at, m.pt + at));
            store(m.qt + at, turned(m.qt + at, m.qpt + at));
        }
    }
}

// E = D G C^T + C G D^T, where C = I. Leaves Q in qpt as `find_change` does.
inline void find_first_change(const Matrices& m) {
    transpose(m.qt, m.ld, m.columns, m.columns, m.qpt, m.ld);
    for (int64_t i = 0; i < m.rank; ++i)
        for (int64_t j = 0; j < m.columns; ++j)
            m.e[i * m.ld + j] = m.qt[i * m.ld + j] + m.qpt[i * m.ld + j];
}

// E = D G C^T + C G D^T, of ct = Ct. Leaves Q and C in qpt and pt_old where they are read along
// their rows.
inline void find_change(const Matrices& m, const Segments& s) {
    if (m.rank > kDownColumns) {
        transpose(m.qt, m.ld, m.columns, m.columns, m.qpt, m.ld);
        transpose(m.ct, m.ld, m.columns, m.columns, m.pt_old, m.ld);
    }
    const auto lower = [&](int64_t i) { return earlier(s, m.rank, i + kTileRows - 1); };
    for_tiles<float>(m.rows, m.columns, m.rank, lower, [&](auto tile, int64_t i, int64_t j) {
        tile.clear();
        add_product(m, tile, m.qpt, m.qt, i, m.ct + j);
        add_product(m, tile, m.pt_old, m.ct, i, m.qt + j);
        tile.store_to(m.e + i * m.ld + j, m.ld);
    });
}

// F = D G D^T
inline void find_second_change(const Matrices& m, const Segments& s) {
    const auto lower = [&](int64_t i) { return earlier(s, m.rank, i + kTileRows - 1); };
    for_tiles<float>(m.rows, m.columns, m.rank, lower, [&](auto tile, int64_t i, int64_t j) {
        tile.clear();
        add_product(m, tile, m.qpt, m.qt, i, m.dt + j);
        tile.store_to(m.f + i * m.ld + j, m.ld);
    });
}

// C += eta D. The diagonal of ct itself is made anew by set_diagonal.
inline void move_c(const Matrices& m, double step) {
    const float eta = static_cast<float>(step);
    for (int64_t i = 0; i < m.rank; ++i) {
        m.diagonal[i] += eta * m.dt[i * m.ld + i];
        for (int64_t j = 0; j < m.columns; j += kWidth) {
            const int64_t at = i * m.ld + j;
            store(m.ct + at, load<FloatVec>(m.ct + at) + load<FloatVec>(m.dt + at) * eta);
        }
    }
}

// H += eta E + eta^2 F.
inline void move_h(const Matrices& m, const Segments& s, double step) {
    const float eta = static_cast<float>(step), square = static_cast<float>(step * step);
    for (int64_t i = 0; i < m.rank; ++i) {
        for (int64_t j = 0; j < earlier(s, m.rank, i); j += kWidth) {
            const int64_t at = i * m.ld + j;
            store(m.h + at, load<FloatVec>(m.h + at) + load<FloatVec>(m.e + at) * eta +
                                load<FloatVec>(m.f + at) * square);
        }
    }
}

// The descent from C = I; leaves C^T in m.ct. Objectives are those of G / scale.
inline DescentStats descend(Matrices& m, const Segments& s, const Pairs& pairs,
                            const DescentOptions& options) {
    for (double* coefficient : pairs.quartic)
        for (int64_t p = 0; p < pairs.count; ++p) coefficient[p] = 0.0;
    find_quartics<1>(m, s, pairs);
    move_energies(pairs, 0.0);
    const double energy_before = total_energy(pairs);
    double moved = 0.0, kpp_old = 0.0;
    Gains gains{};
    Line start = make_line(pairs, options.frobenius, options.gamma, 0, 0, 0);
    DescentStats stats{};
    stats.objective_before = stats.objective_after = start.at(0.0).value;
    if (energy_before > 0 && !options.frobenius) set_weights(m, s, pairs, false);
    Products products{};
    for (int64_t step = 0; energy_before > 0 && step < options.steps; ++step) {
        if (options.frobenius) set_weights(m, s, pairs, true);
        if (step == 0) {
            weigh(m, s, m.pt);  // the gradient where C = I
            find_curvatures(m, s, m.pt, options.gamma);
            precondition(m);
            find_gradient_products<true>(m, products);
            if (!(products.kpp > 0)) break;
            turn<true>(m, products, kpp_old);
            find_first_change(m);
        } else {
            weigh(m, s, m.m);
            set_diagonal(m, 0.0f);
            find_gradient(m, options.gamma);
            find_gradient_products<false>(m, products);
            if (!(products.kpp > 0)) break;
            turn<false>(m, products, kpp_old);
            set_diagonal(m, 1.0f);
            find_change(m, s);
        }
        kpp_old = products.kpp;
        find_second_change(m, s);
        find_quartics<5>(m, s, pairs);
        const Line line = make_line(pairs, options.frobenius, options.gamma, moved,
                                    2 * products.d_change, products.dd);
        const double before = line.at(0.0).value;
        double after = before;
        const double eta = best_step(line, &after);
        if (!(eta > 0)) break;
        move_c(m, eta);
        move_energies(pairs, eta);
        moved += eta * (2 * products.d_change + eta * products.dd);
        products.d_change += eta * products.dd;
        stats.steps += 1;
        stats.objective_after = after;
        if (enough(gains, before - after, options.tol * after)) break;
        move_h(m, s, eta);
        float* used = m.pt_old;
        m.pt_old = m.pt;
        m.pt = used;
    }
    set_diagonal(m, 1.0f);
    stats.cross_left = energy_before > 0 ? total_energy(pairs) / energy_before : 0.0;
    stats.change = __builtin_sqrt(moved > 0 ? moved : 0.0);
    return stats;
}

inline void orthogonalize_item(const float* gram, int64_t rank, const int64_t* ranks, int64_t count,
                               const DescentOptions& options, float* coefficients,
                               DescentStats* stats, Arena& arena) {
    double trace = 0;
    for (int64_t i = 0; i < rank; ++i) trace += gram[i * rank + i];
    const double scale = trace > 0 ? trace / rank : 1.0;
    const Segments s = make_segments(ranks, count, rank, arena);
    Matrices m = make_matrices(rank, count, arena);
    begin_descent(gram, scale, m, s);
    const Pairs pairs = make_pairs(s, arena);
    *stats = descend(m, s, pairs, options);
    stats->objective_before *= scale;
    stats->objective_after *= scale;
    if (trace > 0) stats->change /= __builtin_sqrt(static_cast<double>(rank));
    transpose(m.ct, m.ld, m.columns, m.columns, m.e, m.ld);
    for (int64_t i = 0; i < rank; ++i)
        __builtin_memcpy(coefficients + i * rank, m.e + i * m.ld, rank * sizeof(float));
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
