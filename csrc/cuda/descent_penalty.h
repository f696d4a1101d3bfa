// The penalty of a descent: its weights, the curvatures along factors, and how it changes along a
// direction.
#pragma once

#include "descent_pairs.h"
#include "descent_state.h"

namespace domerge {

template <int kSize>
struct DescentPenalty : DescentPairs<DescentState<kSize>> {
    using State = DescentState<kSize>;
    using Pairs = DescentPairs<State>;
    using typename Pairs::Line;
    static constexpr int kThreads = State::kThreads;
    static constexpr int kLd = State::kLd;

    using Pairs::crosses;
    using Pairs::s;
    typename State::Shared& shared;

    DOMERGE_DEVICE explicit DescentPenalty(State& state) : Pairs(state), shared(state.shared) {}

    // The sum of ||H_ij||^2 over the pairs, and that of ||H_ij||^2 / (n_i n_j).
    DOMERGE_DEVICE Totals<2> energies() const {
        return s.template total<2>([&](int thread, double (&sums)[2]) {
            const float* const h = s.h();
            s.for_lower(thread, [&](int row, int column) {
                float part[2] = {};
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const Vec<4> x = load(h + (row + r) * kLd + column);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        if (row + r <= column + c || !crosses(row + r, column + c)) continue;
                        const float square = x.at[c] * x.at[c];
                        part[0] += square;
                        part[1] += shared.inverse[row + r] * shared.inverse[column + c] * square;
                    }
                }
                DOMERGE_UNROLL
                for (int k = 0; k < 2; ++k) sums[k] += part[k];
            });
        });
    }

    // M = V o H, both triangles. A 4 x 4 block on the diagonal is within both.
    DOMERGE_DEVICE void weigh() const {
        s.each([&](int thread) {
            const float* const h = s.h();
            float* const m = s.weighted();
            const float* const weights = this->weights();
            s.for_lower(thread, [&](int row, int column) {
                const int at = row * kLd + column, mirrored = column * kLd + row;
                Pairs::weigh(h + at, m + at, m + mirrored, kLd, row, column, weights);
            });
        });
    }

    // The curvatures along the rows of X_i, M being at X.
    DOMERGE_DEVICE void find_curvatures() const {
        s.each([&](int thread) {
            const float *const m = s.weighted(), *const gram = s.gram();
            DOMERGE_ROLLED
            for (int i = thread; i < kSize; i += kThreads) {
                float sum = 0;
                for (int k = 0; k < s.rank; ++k) sum += m[k * kLd + i] * gram[k * kLd + i];
                shared.step[i] = sum;
            }
        });
        this->find_steps(kSize);
    }

    // The line on which ||Xhat - X||^2 is q0 + q1 eta + q2 eta^2.
    DOMERGE_DEVICE Line find_line(const Totals<kCoefficients>& quartic, double q0, double q1,
                                  double q2) const {
        if (s.params.frobenius) this->find_quartics();
        return Pairs::line(quartic, q0, q1, q2);
    }
};

}  // namespace domerge
