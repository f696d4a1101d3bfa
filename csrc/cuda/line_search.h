// The exact minimum of the objective along a direction, which is a sum of quartics in the step.
#pragma once

#include <cmath>

#include "block.h"

namespace domerge {

struct Point {
    double value;
    double slope;
    double curvature;
};

DOMERGE_DEVICE Point evaluate(const double (&c)[5], double x) {
    return Point{c[0] + x * (c[1] + x * (c[2] + x * (c[3] + x * c[4]))),
                 c[1] + x * (2 * c[2] + x * (3 * c[3] + x * 4 * c[4])),
                 2 * c[2] + x * (6 * c[3] + x * 12 * c[4])};
}

// A root of the slope of at(eta): bracketed by doubling, then Newton's steps, bisection where they
// leave the bracket. Returns 0 when no step lowers the objective. All threads take the same path;
// `at` may hold phases.
template <class At>
DOMERGE_DEVICE double best_step(At at, double before, double* value_after) {
    double low = 0.0, high = 1.0 / 64;
    for (int i = 0; i < 60 && at(high).slope < 0; ++i) {
        low = high;
        high *= 2;
    }
    double eta = 0.5 * (low + high);
    for (int i = 0; i < 100 && high - low > 1e-9 * high; ++i) {
        const Point here = at(eta);
        (here.slope < 0 ? low : high) = eta;
        double next = eta - here.slope / here.curvature;
        if (!(next > low && next < high)) next = 0.5 * (low + high);
        const double moved = fabs(next - eta);
        eta = next;
        if (moved <= 1e-10 * eta) break;
    }
    for (int i = 0; i < 60; ++i, eta /= 2) {
        *value_after = at(eta).value;
        if (*value_after <= before) return eta;
    }
    return 0.0;
}

}  // namespace domerge
