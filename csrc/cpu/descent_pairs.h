// The pairs of factors of a descent on R x R matrices: their energies, weights, and how these
// change along a direction.
#pragma once

#include "descent_state.h"
#include "line_search.h"

namespace domerge {
namespace DOMERGE_ISA {

// Calls body(p, i, j) for the pairs i < j of non-zero factors, p counting them.
template <class Body>
DOMERGE_INLINE int64_t for_pairs(const Segments& s, Body body) {
    int64_t p = 0;
    for (int64_t j = 1; j < s.count; ++j)
        for (int64_t i = 0; i < j; ++i)
            if (s.factor_norm[i] > 0 && s.factor_norm[j] > 0) body(p++, i, j);
    return p;
}

inline Pairs make_pairs(const Segments& s, Arena& arena) {
    Pairs pairs{};
    pairs.count = for_pairs(s, [](int64_t, int64_t, int64_t) {});
    const auto take = [&] {
        return static_cast<double*>(arena.take((pairs.count + 1) * sizeof(double)));
    };
    for (double*& coefficient : pairs.quartic) coefficient = take();
    pairs.weight = take();
    pairs.energy = take();
    for_pairs(s, [&](int64_t p, int64_t i, int64_t j) {
        pairs.weight[p] = 1.0 / (s.factor_norm[i] * s.factor_norm[j]);
    });
    return pairs;
}

// Adds to m.sums (or sets it, when `first`) the columns' sums of the coefficients' terms over rows
// [begin, end); of one coefficient, only that of the energies: E and F count as zero.
template <int kCoefficients>
inline void add_quartics(const Matrices& m, int64_t begin, int64_t end, int64_t columns,
                         bool first) {
    for (int64_t c = 0; c < columns; c += kWidth) {
        FloatVec part[kCoefficients] = {};
        for (int64_t r = begin; r < end; ++r) {
            const int64_t at = r * m.ld + c;
            const FloatVec h = load<FloatVec>(m.h + at);
            part[0] += h * h;
            if constexpr (kCoefficients == 5) {
                const FloatVec e = load<FloatVec>(m.e + at), f = load<FloatVec>(m.f + at);
                part[1] += h * e;
                part[2] += e * e;
                part[2] += (h + h) * f;
                part[3] += e * f;
                part[4] += f * f;
            }
        }
        for (int k = 0; k < kCoefficients; ++k) {
            double* sum = m.sums + k * m.ld + c;
            Widened wide = widen(part[k]);
            if (!first) {
                wide.low += load<DoubleVec>(sum);
                wide.high += load<DoubleVec>(sum + kLanes<double>);
            }
            store(sum, wide.low);
            store(sum + kLanes<double>, wide.high);
        }
    }
}

// Coefficients of ||H_ij + eta E_ij + eta^2 F_ij||^2 for all i of one j after the other.
template <int kCoefficients>
inline void find_quartics(const Matrices& m, const Segments& s, const Pairs& pairs) {
    constexpr int64_t kRows = 32;  // summed in float, then in double
    int64_t p = 0;
    for (int64_t j = 1; j < s.count; ++j) {
        if (!(s.factor_norm[j] > 0)) continue;
        const int64_t columns = s.start[j];
        for (int64_t begin = s.start[j]; begin < s.start[j + 1]; begin += kRows)
            add_quartics<kCoefficients>(m, begin, least(begin + kRows, s.start[j + 1]), columns,
                                        begin == s.start[j]);
        for (int64_t i = 0; i < j; ++i) {
            if (!(s.factor_norm[i] > 0)) continue;
            for (int k = 0; k < kCoefficients; ++k) {
                double sum = 0.0;
                for (int64_t c = s.start[i]; c < s.start[i + 1]; ++c) sum += m.sums[k * m.ld + c];
                pairs.quartic[k][p] = k == 1 || k == 3 ? 2 * sum : sum;
            }
            ++p;
        }
    }
}

// V of the squared penalty is constant; that of the Frobenius penalty follows the energies.
inline void set_weights(const Matrices& m, const Segments& s, const Pairs& pairs, bool frobenius) {
    for_pairs(s, [&](int64_t p, int64_t i, int64_t j) {
        const double floor = kFrobeniusFloor / pairs.weight[p];
        const double v = frobenius ? 2.0 / __builtin_sqrt(pairs.energy[p] + floor * floor)
                                   : 4.0 * pairs.weight[p];
        for (int64_t c = s.start[i]; c < s.start[i + 1]; ++c)
            m.weight[j * m.ld + c] = static_cast<float>(v);
    });
}

inline double total_energy(const Pairs& pairs) {
    double sum = 0;
    for (int64_t p = 0; p < pairs.count; ++p) sum += pairs.energy[p];
    return sum;
}

inline void move_energies(const Pairs& pairs, double eta) {
    for (int64_t p = 0; p < pairs.count; ++p) {
        const double c[5] = {pairs.quartic[0][p], pairs.quartic[1][p], pairs.quartic[2][p],
                             pairs.quartic[3][p], pairs.quartic[4][p]};
        const double energy = evaluate(c, eta).value;
        pairs.energy[p] = energy > 0 ? energy : 0.0;
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
