// Descends on the factors themselves: the squared penalty, at O(R d^2) a step.
#pragma once

#include <cstdint>
#include <functional>

#include "factor_kernels.h"

namespace domerge {

struct FactorStats {
    double steps;
    double objective_before;
    double objective_after;
    double cross_left;   // of the penalty's part of the objective
    double change;       // ||Xhat - X|| / ||X||
    double scaled;       // the share of ||Xhat - X||^2 that is X_i's times numbers
    double least_share;  // of the sum over all pairs, what those of two adapters held at least
};

// body(item, arena) for item = 0 .. count - 1.
using Body = std::function<void(int64_t, Arena&)>;
using Run = std::function<void(int64_t count, const Body&)>;

// Blocks in rows; out [R, d]. `memory` is scratch. The rule is that of domerge_fast/backends/
// descent.py, in_factor_form.
FactorStats descend_on_factors(const FactorKernels&, const Problem&, const DescentOptions&,
                               float* out, const Run&, Arena& memory);

}  // namespace domerge
