// The penalty of a descent: its weights, the curvatures along factors, and how it changes along a
// direction.
#pragma once

#include "descent_state.h"
#include "line_search.h"

namespace domerge {

template <int kSize>
struct DescentPenalty {
    using State = DescentState<kSize>;
    static constexpr int kThreads = State::kThreads;
    static constexpr int kLd = State::kLd;
    static constexpr int kCoefficients = State::kCoefficients;
    static constexpr int kMaxPairs = State::kMaxPairs;

    State& s;
    typename State::Shared& shared;

    DOMERGE_DEVICE explicit DescentPenalty(State& state) : s(state), shared(state.shared) {}

    // For the Frobenius penalty: pair p = j (j - 1) / 2 + i of the factors i < j. ||H_ij(eta)||_F^2
    // is a quartic in eta.
    DOMERGE_DEVICE int pairs() const { return s.count * (s.count - 1) / 2; }
    // Coefficient k of pair p is at k * kMaxPairs + p.
    DOMERGE_DEVICE double* quartics() const { return reinterpret_cast<double*>(s.beyond()); }
    // EPS n_i n_j, 0 where a factor is negligible.
    DOMERGE_DEVICE double* floors() const { return quartics() + kCoefficients * kMaxPairs; }
    // V_ij.
    DOMERGE_DEVICE float* weights() const { return reinterpret_cast<float*>(floors() + kMaxPairs); }

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

    DOMERGE_DEVICE void find_floors() {
        s.each([&](int thread) {
            double* const floors = this->floors();
            for_pairs(thread, [&](int p) {
                const int j = later_of(p), i = p - pair(0, j);
                floors[p] = kFrobeniusFloor * shared.norm[i] * shared.norm[j];
            });
        });
    }

    // Whether an entry of H below the diagonal counts: its factors differ and neither is
    // negligible.
    DOMERGE_DEVICE bool crosses(int row, int column) const {
        return shared.owner[row] != shared.owner[column] && shared.inverse[row] > 0 &&
               shared.inverse[column] > 0;
    }

    // V of an entry that counts.
    DOMERGE_DEVICE float weight(const float* weights, int row, int column) const {
        if (s.params.frobenius) return weights[pair(shared.owner[column], shared.owner[row])];
        return 4 * shared.inverse[row] * shared.inverse[column];
    }

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
                Vec<4> straight[4], flipped[4];
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const Vec<4> x = load(h + (row + r) * kLd + column);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        const bool used = row + r > column + c && crosses(row + r, column + c);
                        straight[r].at[c] = flipped[c].at[r] =
                            used ? weight(weights, row + r, column + c) * x.at[c] : 0.0f;
                    }
                }
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    if (row == column) {
                        DOMERGE_UNROLL
                        for (int c = 0; c < 4; ++c) straight[r].at[c] += flipped[r].at[c];
                    }
                    store(m + (row + r) * kLd + column, straight[r]);
                    if (row != column) store(m + (column + r) * kLd + row, flipped[r]);
                }
            });
        });
    }

    // The curvatures along the rows of X_i, M being at X: that of the penalty is
    // sum_j V_ij ||G_ij||^2 / n_i^2.
    DOMERGE_DEVICE void find_curvatures() const {
        s.each([&](int thread) {
            const float *const m = s.weighted(), *const gram = s.gram();
            DOMERGE_ROLLED
            for (int i = thread; i < kSize; i += kThreads) {
                float sum = 0;
                for (int k = 0; k < s.rank; ++k) sum += m[k * kLd + i] * gram[k * kLd + i];
                shared.step[i] = sum;
                shared.curvature[i] = 0.0f;
            }
        });
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int j = thread; j < s.count; j += kThreads) {
                double sum = 0;
                DOMERGE_ROLLED
                for (int i = shared.start[j]; i < shared.start[j + 1]; ++i) sum += shared.step[i];
                const double norm = shared.norm[j];
                if (norm > 0)
                    shared.curvature[shared.start[j]] = static_cast<float>(sum / (norm * norm));
            }
        });
        s.each([&](int thread) {
            float largest = 0;
            DOMERGE_ROLLED
            for (int j = 0; j < s.count; ++j) {
                const float mean = shared.curvature[shared.start[j]];
                if (mean > largest) largest = mean;
            }
            DOMERGE_ROLLED
            for (int i = thread; i < kSize; i += kThreads) {
                const int owner = shared.owner[i];
                shared.step[i] = 0.0f;
                if (owner < 0) continue;
                const float mean = shared.curvature[shared.start[owner]];
                const double k = bounded_curvature(mean, largest, s.params.gamma);
                if (k > 0) shared.step[i] = static_cast<float>(1 / k);
            }
        });
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int i = thread; i < kSize; i += kThreads) {
                const float step = shared.step[i];
                shared.curvature[i] = step > 0 ? 1 / step : 0.0f;
            }
        });
    }

    // Adds the coefficients of w (x + eta y + eta^2 z)^2, those of odd powers by half.
    static DOMERGE_DEVICE void add_quartic(float* part, float x, float y, float z, float w) {
        part[0] += w * x * x;
        part[1] += w * x * y;
        part[2] += w * (y * y + 2 * x * z);
        part[3] += w * y * z;
        part[4] += w * z * z;
    }

    // The coefficients of every pair's ||H_ij + eta E_ij + eta^2 F_ij||^2. As many threads share a
    // pair as have 8 entries each, on average.
    DOMERGE_DEVICE void find_pair_quartics() const {
        int lanes = 1;
        while (lanes < kThreads && lanes * 16 * pairs() <= s.rank * s.rank / 2) lanes *= 2;
        const int at_once = kThreads / lanes;
        for (int first = 0; first < pairs(); first += at_once) {
            s.each([&](int thread) {
                float part[kCoefficients] = {};
                if (first + thread / lanes < pairs())
                    add_pair(part, first + thread / lanes, thread % lanes, lanes);
                DOMERGE_UNROLL
                for (int k = 0; k < kCoefficients; ++k) shared.partial[k][thread] = part[k];
            });
            s.each([&](int thread) {
                double* const quartics = this->quartics();
                DOMERGE_ROLLED
                for (int i = thread; i < kCoefficients * at_once; i += kThreads) {
                    const int k = i / at_once, slot = i % at_once;
                    if (first + slot >= pairs()) continue;
                    double sum = 0;
                    DOMERGE_ROLLED
                    for (int l = 0; l < lanes; ++l) sum += shared.partial[k][slot * lanes + l];
                    quartics[k * kMaxPairs + first + slot] = k % 2 == 1 ? 2 * sum : sum;
                }
            });
        }
    }

    DOMERGE_DEVICE void add_pair(float (&part)[kCoefficients], int p, int lane, int lanes) const {
        if (!(floors()[p] > 0)) return;
        const int j = later_of(p), i = p - pair(0, j);
        const int width = shared.start[i + 1] - shared.start[i];
        const int entries = width * (shared.start[j + 1] - shared.start[j]);
        const float *const h = s.h(), *const changes = s.next();
        for (int k = lane; k < entries; k += lanes) {
            const int row = shared.start[j] + k / width, column = shared.start[i] + k % width;
            const int at = row * kLd + column;
            add_quartic(part, h[at], changes[at], changes[column * kLd + row], 1.0f);
        }
    }

    static DOMERGE_DEVICE Point pair_at(const double* quartics, int p, double eta) {
        double c[kCoefficients];
        DOMERGE_UNROLL
        for (int k = 0; k < kCoefficients; ++k) c[k] = quartics[k * kMaxPairs + p];
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
        const DescentPenalty& penalty;
        Totals<kCoefficients> quartic;  // of the squared penalty
        double change[3];               // gamma ||Xhat - X||^2

        DOMERGE_DEVICE Point operator()(double eta) const {
            const Point sum =
                penalty.s.params.frobenius ? penalty.norms_at(eta) : evaluate(quartic.at, eta);
            return Point{2 * sum.value + change[0] + eta * (change[1] + eta * change[2]),
                         2 * sum.slope + change[1] + 2 * eta * change[2],
                         2 * sum.curvature + 2 * change[2]};
        }
    };

    // The line on which ||Xhat - X||^2 is q0 + q1 eta + q2 eta^2.
    DOMERGE_DEVICE Line find_line(const Totals<kCoefficients>& quartic, double q0, double q1,
                                  double q2) const {
        if (s.params.frobenius) find_pair_quartics();
        const double gamma = s.params.gamma;
        return Line{*this, quartic, {gamma * q0, gamma * q1, gamma * q2}};
    }
};

}  // namespace domerge
