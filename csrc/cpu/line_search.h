// The objective along a direction, as sums of quartics in the step, and its exact minimum.
#pragma once

#include <cstdint>

#include "../common/descent.h"
#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

struct Point {
    double value;
    double slope;
    double curvature;
};

// ||H_ij(eta)||_F^2 = c0 + c1 eta + ... + c4 eta^4 for the pairs i < j of non-zero factors.
struct Pairs {
    int64_t count;
    double* quartic[5];  // each [count]
    double* weight;      // [count]: 1 / (n_i n_j)
    double* energy;      // [count]: ||H_ij||^2 at the current C
};

DOMERGE_INLINE Point evaluate(const double (&c)[5], double x) {
    return Point{c[0] + x * (c[1] + x * (c[2] + x * (c[3] + x * c[4]))),
                 c[1] + x * (2 * c[2] + x * (3 * c[3] + x * 4 * c[4])),
                 2 * c[2] + x * (6 * c[3] + x * 12 * c[4])};
}

// The objective on one line. Ordered pairs count twice.
struct Line {
    const Pairs& pairs;
    bool frobenius;
    double change[3];   // gamma ||Xhat - X||^2 = change[0] + change[1] eta + change[2] eta^2
    double squared[5];  // sum of weight * quartic, where the penalty is squared

    Point at(double eta) const {
        Point sum = frobenius ? frobenius_at(eta) : evaluate(squared, eta);
        return Point{2 * sum.value + change[0] + eta * (change[1] + eta * change[2]),
                     2 * sum.slope + change[1] + 2 * eta * change[2],
                     2 * sum.curvature + 2 * change[2]};
    }

    // Several pairs side by side: their square roots and divisions overlap.
    Point frobenius_at(double eta) const {
        constexpr int lanes = 8;
        double value[lanes] = {}, slope[lanes] = {}, curvature[lanes] = {};
        for (int64_t begin = 0; begin < pairs.count; begin += lanes) {
            const int64_t left = pairs.count - begin, n = left < lanes ? left : lanes;
            for (int64_t l = 0; l < n; ++l) {
                const int64_t p = begin + l;
                const double c[5] = {pairs.quartic[0][p], pairs.quartic[1][p], pairs.quartic[2][p],
                                     pairs.quartic[3][p], pairs.quartic[4][p]};
                const Point energy = evaluate(c, eta);
                const double floor = kFrobeniusFloor / pairs.weight[p];
                const double norm =
                    __builtin_sqrt((energy.value > 0 ? energy.value : 0.0) + floor * floor);
                const double first = energy.slope / (2 * norm);
                value[l] += norm;
                slope[l] += first;
                curvature[l] += (energy.curvature / 2 - first * first) / norm;
            }
        }
        Point sum{0, 0, 0};
        for (int l = 0; l < lanes; ++l)
            sum = Point{sum.value + value[l], sum.slope + slope[l], sum.curvature + curvature[l]};
        return sum;
    }
};

inline Line make_line(const Pairs& pairs, bool frobenius, double gamma, double q0, double q1,
                      double q2) {
    Line line{pairs, frobenius, {gamma * q0, gamma * q1, gamma * q2}, {}};
    if (!frobenius)
        for (int k = 0; k < 5; ++k)
            for (int64_t p = 0; p < pairs.count; ++p)
                line.squared[k] += pairs.weight[p] * pairs.quartic[k][p];
    return line;
}

// A root of the slope: bracketed by doubling, then Newton's steps, bisection where they leave the
// bracket. Returns 0 when no step lowers the objective.
inline double best_step(const Line& line, double* value_after) {
    double low = 0.0, high = 1.0 / 64;
    for (int i = 0; i < 60 && line.at(high).slope < 0; ++i) {
        low = high;
        high *= 2;
    }
    double eta = 0.5 * (low + high);
    for (int i = 0; i < 100 && high - low > 1e-9 * high; ++i) {
        const Point here = line.at(eta);
        (here.slope < 0 ? low : high) = eta;
        double next = eta - here.slope / here.curvature;
        if (!(next > low && next < high)) next = 0.5 * (low + high);
        const double moved = __builtin_fabs(next - eta);
        eta = next;
        if (moved <= 1e-10 * eta) break;
    }
    const double before = line.at(0.0).value;
    for (int i = 0; i < 60; ++i, eta /= 2) {
        *value_after = line.at(eta).value;
        if (*value_after <= before) return eta;
    }
    return 0.0;
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
