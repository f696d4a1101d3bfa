// The pairs of factors of a descent: which entries count and their weights, the preconditioner, and
// the objective along a direction. State is that of a block with a whole problem (descent_state.h)
// or of one of many (tiles_state.h).
#pragma once

#include "descent_rule.h"
#include "line_search.h"
#include "square_product.h"

namespace domerge {

template <class State>
struct DescentPairs {
    static constexpr int kThreads = State::kThreads;

    State& s;

    DOMERGE_DEVICE explicit DescentPairs(State& state) : s(state) {}

    // For the Frobenius penalty: pair p = j (j - 1) / 2 + i of the factors i < j. ||H_ij(eta)||_F^2
    // is a quartic in eta.
    DOMERGE_DEVICE int pairs() const { return s.count * (s.count - 1) / 2; }
    // Coefficient k of pair p is at k * pair_room() + p.
    DOMERGE_DEVICE double* quartics() const { return s.pair_numbers(); }
    // EPS n_i n_j, 0 where a factor is negligible.
    DOMERGE_DEVICE double* floors() const { return quartics() + kCoefficients * s.pair_room(); }
    // V_ij.
    DOMERGE_DEVICE float* weights() const {
        return reinterpret_cast<float*>(floors() + s.pair_room());
    }

    // Calls visit(p) for this thread's share of the pairs.
    template <class Visit>
    DOMERGE_DEVICE void for_pairs(int thread, Visit visit) const {
        DOMERGE_ROLLED
        for (int p = thread; p < pairs(); p += kThreads) visit(p);
    }

    DOMERGE_DEVICE static int later_of(int p) {
        int j = static_cast<int>((1 + sqrtf(static_cast<float>(1 + 8 * p))) / 2);
        while (pair(0, j) > p) --j;
        while (pair(0, j + 1) <= p) ++j;
        return j;
    }
    DOMERGE_DEVICE static int pair(int i, int j) { return j * (j - 1) / 2 + i; }

    DOMERGE_DEVICE void find_floors() const {
        s.each([&](int thread) {
            double* const floors = this->floors();
            for_pairs(thread, [&](int p) {
                const int j = later_of(p), i = p - pair(0, j);
                floors[p] = kFrobeniusFloor * s.norm(i) * s.norm(j);
            });
        });
    }

    // Whether an entry of H below the diagonal counts: its factors differ and neither is
    // negligible.
    DOMERGE_DEVICE bool crosses(int row, int column) const {
        return s.owner(row) != s.owner(column) && s.inverse(row) > 0 && s.inverse(column) > 0;
    }

    // V of an entry that counts.
    DOMERGE_DEVICE float weight(const float* weights, int row, int column) const {
        if (s.params.frobenius) return weights[pair(s.owner(column), s.owner(row))];
        return 4 * s.inverse(row) * s.inverse(column);
    }

    // M = V o H of the 4 x 4 entries from (row, column) on, at or below the diagonal, and of those
    // that mirror them: `flipped`. On the diagonal they are the same.
    DOMERGE_DEVICE void weigh(const float* h, float* straight, float* flipped, int ld, int row,
                              int column, const float* weights) const {
        Vec<4> down[4], across[4];
        DOMERGE_UNROLL
        for (int r = 0; r < 4; ++r) {
            const Vec<4> x = load(h + r * ld);
            DOMERGE_UNROLL
            for (int c = 0; c < 4; ++c) {
                const bool used = row + r > column + c && crosses(row + r, column + c);
                down[r].at[c] = across[c].at[r] =
                    used ? weight(weights, row + r, column + c) * x.at[c] : 0.0f;
            }
        }
        DOMERGE_UNROLL
        for (int r = 0; r < 4; ++r) {
            if (row == column) {
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) down[r].at[c] += across[r].at[c];
            }
            store(straight + r * ld, down[r]);
            if (row != column) store(flipped + r * ld, across[r]);
        }
    }

    // The curvatures along the rows of X_i, which are those of the penalty and the pull's, and one
    // over them. step(i) is before what row i adds to sum_j V_ij ||G_ij||^2, i in [0, rows).
    DOMERGE_DEVICE void find_steps(int rows) const {
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int j = thread; j < s.count; j += kThreads) {
                double sum = 0;
                DOMERGE_ROLLED
                for (int i = s.first_row(j); i < s.first_row(j + 1); ++i) sum += s.step(i);
                const double norm = s.norm(j);
                s.curvature(s.first_row(j)) =
                    norm > 0 ? static_cast<float>(sum / (norm * norm)) : 0.0f;
            }
        });
        s.each([&](int thread) {
            float largest = 0;
            DOMERGE_ROLLED
            for (int j = 0; j < s.count; ++j) {
                const float mean = s.curvature(s.first_row(j));
                if (mean > largest) largest = mean;
            }
            DOMERGE_ROLLED
            for (int i = thread; i < rows; i += kThreads) {
                const int owner = s.owner(i);
                s.step(i) = 0.0f;
                if (owner < 0) continue;
                const float mean = s.curvature(s.first_row(owner));
                const double k = bounded_curvature(mean, largest, s.params.gamma);
                if (k > 0) s.step(i) = static_cast<float>(1 / k);
            }
        });
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int i = thread; i < rows; i += kThreads) {
                const float step = s.step(i);
                s.curvature(i) = step > 0 ? 1 / step : 0.0f;
            }
        });
    }

    // The coefficients of ||H_ij + eta E_ij + eta^2 F_ij||^2 of the pairs of a block of `blocks`.
    // As many threads share a pair as have 8 entries each, on average.
    DOMERGE_DEVICE void find_quartics(int block = 0, int blocks = 1) const {
        if (pairs() == 0) return;
        const unsigned share = static_cast<unsigned>(s.rank) * s.rank / 32u / pairs();
        int lanes = 1;
        while (lanes < kThreads && static_cast<unsigned>(lanes) <= share) lanes *= 2;
        const int at_once = kThreads / lanes;
        for (int first = block * at_once; first < pairs(); first += blocks * at_once) {
            s.each([&](int thread) {
                float part[kCoefficients] = {};
                if (first + thread / lanes < pairs())
                    add_pair(part, first + thread / lanes, thread % lanes, lanes);
                DOMERGE_UNROLL
                for (int k = 0; k < kCoefficients; ++k) s.shared.partial[k][thread] = part[k];
            });
            s.each([&](int thread) {
                double* const quartics = this->quartics();
                DOMERGE_ROLLED
                for (int i = thread; i < kCoefficients * at_once; i += kThreads) {
                    const int k = i / at_once, slot = i % at_once;
                    if (first + slot >= pairs()) continue;
                    double sum = 0;
                    DOMERGE_ROLLED
                    for (int l = 0; l < lanes; ++l) sum += s.shared.partial[k][slot * lanes + l];
                    quartics[k * s.pair_room() + first + slot] = k % 2 == 1 ? 2 * sum : sum;
                }
            });
        }
    }

    DOMERGE_DEVICE void add_pair(float (&part)[kCoefficients], int p, int lane, int lanes) const {
        if (!(floors()[p] > 0)) return;
        const int j = later_of(p), i = p - pair(0, j);
        const int top = s.first_row(j), left = s.first_row(i);
        const int width = s.first_row(i + 1) - left;
        const int count = width * (s.first_row(j + 1) - top);
        const auto entries = s.entries();
        for (int k = lane; k < count; k += lanes) {
            const auto at = entries(top + k / width, left + k % width);
            add_quartic(part, at.x, at.y, at.z, 1.0f);
        }
    }

    DOMERGE_DEVICE Point pair_at(const double* quartics, int p, double eta) const {
        double c[kCoefficients];
        DOMERGE_UNROLL
        for (int k = 0; k < kCoefficients; ++k) c[k] = quartics[k * s.pair_room() + p];
        const Point energy = evaluate(c, eta);
        return Point{energy.value > 0 ? energy.value : 0.0, energy.slope, energy.curvature};
    }

    // V of the Frobenius penalty follows the energies at eta.
    DOMERGE_DEVICE void set_weights(double eta) const {
        s.each([&](int thread) {
            const double *const floors = this->floors(), *const quartics = this->quartics();
            float* const weights = this->weights();
            for_pairs(thread, [&](int p) {
                const double floor = floors[p];
                const double norm = sqrt(pair_at(quartics, p, eta).value + floor * floor);
                weights[p] = norm > 0 ? static_cast<float>(2 / norm) : 0.0f;
            });
        });
    }

    // The sum of the smoothed norms.
    DOMERGE_DEVICE Point norms_at(double eta) const {
        const Totals<3> totals = s.template total<3>([&](int thread, double (&sums)[3]) {
            const double *const floors = this->floors(), *const quartics = this->quartics();
            for_pairs(thread, [&](int p) {
                const Point energy = pair_at(quartics, p, eta);
                const double floor = floors[p];
                if (!(floor > 0)) return;
                const double norm = sqrt(energy.value + floor * floor);
                const double first = energy.slope / (2 * norm);
                sums[0] += norm;
                sums[1] += first;
                sums[2] += (energy.curvature / 2 - first * first) / norm;
            });
        });
        return Point{totals.at[0], totals.at[1], totals.at[2]};
    }

    // The objective on one line. Ordered pairs count twice.
    struct Line {
        const DescentPairs& pairs;
        Totals<kCoefficients> quartic;  // of the squared penalty
        double change[3];               // gamma ||Xhat - X||^2

        DOMERGE_DEVICE Point operator()(double eta) const {
            const Point sum =
                pairs.s.params.frobenius ? pairs.norms_at(eta) : evaluate(quartic.at, eta);
            return Point{2 * sum.value + change[0] + eta * (change[1] + eta * change[2]),
                         2 * sum.slope + change[1] + 2 * eta * change[2],
                         2 * sum.curvature + 2 * change[2]};
        }
    };

    // The line on which ||Xhat - X||^2 is q0 + q1 eta + q2 eta^2.
    DOMERGE_DEVICE Line line(const Totals<kCoefficients>& quartic, double q0, double q1,
                             double q2) const {
        const double gamma = s.params.gamma;
        return Line{*this, quartic, {gamma * q0, gamma * q1, gamma * q2}};
    }
};

}  // namespace domerge
