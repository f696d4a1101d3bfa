// The rule by which a descent goes on, and sums over all threads of a block: the same for blocks
// that have a whole problem (descent_steps.h) and for those that have a tile (tiles_phases.h).
#pragma once

#include "../common/descent.h"
#include "block.h"

namespace domerge {

template <int kCount>
struct Totals {
    double at[kCount];
};

constexpr int kCoefficients = 5;  // of a quartic
constexpr int kSums = 6;          // as many are added up at once
constexpr int kGroups = 16;       // of threads, whose sums are added first

// Sums of what part(thread, sums) adds up, in an order that is always the same. `shared` has room
// for them: partial [kSums, kThreads], group [kSums, kGroups] and total [kSums].
template <int kCount, int kThreads, class Shared, class Each, class Part>
DOMERGE_DEVICE Totals<kCount> add_up(Shared& shared, Each each, Part part) {
    each([&](int thread) {
        double sums[kCount] = {};
        part(thread, sums);
        DOMERGE_UNROLL
        for (int k = 0; k < kCount; ++k) shared.partial[k][thread] = sums[k];
    });
    each([&](int thread) {
        constexpr int length = kThreads / kGroups;
        DOMERGE_ROLLED
        for (int i = thread; i < kCount * kGroups; i += kThreads) {
            const double* partial = &shared.partial[i / kGroups][i % kGroups * length];
            double sum = 0;
            for (int l = 0; l < length; ++l) sum += partial[l];
            shared.group[i / kGroups][i % kGroups] = sum;
        }
    });
    each([&](int thread) {
        if (thread >= kCount) return;
        double sum = 0;
        for (int g = 0; g < kGroups; ++g) sum += shared.group[thread][g];
        shared.total[thread] = sum;
    });
    Totals<kCount> totals;
    DOMERGE_UNROLL
    for (int k = 0; k < kCount; ++k) totals.at[k] = shared.total[k];
    return totals;
}

// Numbers of one thread that add_up adds: of an entry's products, or of its quartic.
struct Part {
    float at[kSums];
};

// <A, B>_G = tr(A G B^T), kept up to date instead of being computed anew.
struct Products {
    double kpp, kp_old_p, kp_d;  // of the gradient K P with P, the last P, and D
    double pp, p_d, p_change;    // of P with P, D, and C - I
    double dd, d_change;         // of D with D and with C - I

    // Those of a gradient, in the order of add_gradient.
    DOMERGE_DEVICE void find(const Totals<kSums>& totals) {
        kpp = totals.at[0];
        kp_old_p = totals.at[1];
        kp_d = totals.at[2];
        pp = totals.at[3];
        p_d = totals.at[4];
        p_change = totals.at[5];
    }

    // beta of D = -P + beta D by Polak and Ribiere. kpp_old: of the last gradient, 0 before.
    DOMERGE_DEVICE double beta(double kpp_old) const {
        const double beta = kpp_old > 0 ? (kpp - kp_old_p) / kpp_old : 0.0;
        return !(beta > 0) || -kpp + beta * kp_d >= 0 ? 0.0 : beta;
    }

    // The direction becomes -P + beta D.
    DOMERGE_DEVICE void turn(double beta) {
        dd = pp - 2 * beta * p_d + beta * beta * dd;
        d_change = -p_change + beta * d_change;
    }
};

// Adds an entry's share of the gradient's products: of P it is p, of P G q, of D and C - I d and
// change. `one` and `last` are p and that of the last P G, or q and that of the last P.
DOMERGE_DEVICE void add_gradient(Part& sums, float k, float p, float q, float one, float last,
                                 float d, float change) {
    const float kq = k * q;
    sums.at[0] += kq * p;
    sums.at[1] += k * one * last;
    sums.at[2] += kq * d;
    sums.at[3] += q * p;
    sums.at[4] += q * d;
    sums.at[5] += q * change;
}

// Adds the coefficients of w (x + eta y + eta^2 z)^2, those of odd powers by half.
DOMERGE_DEVICE void add_quartic(float* part, float x, float y, float z, float w) {
    part[0] += w * x * x;
    part[1] += w * x * y;
    part[2] += w * (y * y + 2 * x * z);
    part[3] += w * y * z;
    part[4] += w * z * z;
}

}  // namespace domerge
