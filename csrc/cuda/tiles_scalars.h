// The phases of a descent by tiles that make scalars: a block has all of a problem.
#pragma once

#include "tiles_state.h"

namespace domerge {

// What each of them is: Body::run(state, pairs).
template <class Body>
struct OfProblem {
    using Params = TilesParams;
    static constexpr int kThreads = kTileThreads;
    static constexpr int kBlocksPerSm = 1;
    static constexpr int64_t kSharedBytes = sizeof(TiledState::Shared);

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TiledState state(params, block, block.index);
        Body::run(state, DescentPairs<const TiledState>(state));
    }
};

using Pairs = DescentPairs<const TiledState>;

// The scale, the factors' norms, and the factor of every row.
struct Start {
    static DOMERGE_DEVICE void run(const TiledState& s, const Pairs& pairs) {
        const float* const g = global(s.given());
        const int64_t next = int64_t{s.rank} + 1;
        const double trace = s.total<1>([&](int thread, double (&sums)[1]) {
                                  for (int i = thread; i < s.rank; i += s.kThreads)
                                      sums[0] += g[i * next];
                              }).at[0];
        const double scale = trace > 0 ? trace / s.rank : 1.0;
        s.each([&](int thread) {
            if (thread == 0) {
                s.whole() = Whole{};
                s.whole().running = 1;
                s.whole().scale = scale;
            }
            DOMERGE_ROLLED
            for (int i = thread; i < s.ld; i += s.kThreads) {
                s.inverse(i) = 0.0f;
                if (i >= s.rank) s.owner(i) = -1;
            }
            DOMERGE_ROLLED
            for (int j = thread; j < s.count; j += s.kThreads) {
                double own = 0;
                for (int i = s.first_row(j); i < s.first_row(j + 1); ++i) {
                    own += static_cast<float>(g[i * next] / scale);
                    s.owner(i) = j;
                }
                s.norm(j) = own > 0 ? sqrt(own) : 0.0;
            }
        });
        PerThread<double, TiledState::kThreads> largest;
        s.each([&](int thread) {
            largest[thread] = 0;
            for (int j = 0; j < s.count; ++j)
                if (s.norm(j) > largest[thread]) largest[thread] = s.norm(j);
        });
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int j = thread; j < s.count; j += s.kThreads) {
                const double norm = s.norm(j);
                if (norm <= kNegligible * largest[thread]) {
                    s.norm(j) = 0;
                    continue;
                }
                DOMERGE_ROLLED
                for (int i = s.first_row(j); i < s.first_row(j + 1); ++i)
                    s.inverse(i) = static_cast<float>(1 / norm);
            }
        });
        if (s.params.frobenius) pairs.find_floors();
    }
};

// V of the Frobenius penalty at X.
struct SetWeights {
    static DOMERGE_DEVICE void run(const TiledState&, const Pairs& pairs) {
        pairs.set_weights(0.0);
    }
};

// The objective at X, and the preconditioner.
struct Begin {
    static DOMERGE_DEVICE void run(const TiledState& s, const Pairs& pairs) {
        s.each([&](int thread) {
            DOMERGE_ROLLED
            for (int i = thread; i < s.ld; i += s.kThreads) {
                float sum = 0;
                for (int half = 0; half < 2 * s.across; ++half) sum += s.pulls(half)[i];
                s.step(i) = sum;
            }
        });
        pairs.find_steps(s.ld);
        const Totals<2> energies = s.of_tiles<2>(0, true);
        const double objective = pairs.line({{energies.at[1]}}, 0, 0, 0)(0.0).value;
        s.each([&](int thread) {
            if (thread != 0) return;
            s.whole().running = energies.at[0] > 0 ? 1 : 0;
            s.whole().energy_before = energies.at[0];
            s.note(1, objective * s.whole().scale);
            s.note(2, objective * s.whole().scale);
        });
    }
};

// The step along D, and whether it is the last.
struct Search {
    static DOMERGE_DEVICE void run(const TiledState& s, const Pairs& pairs) {
        Whole whole = s.whole();
        const bool running = whole.running > 0;
        whole.running = whole.eta = 0;
        double after = 0;
        if (running) find(s, pairs, whole, after);
        s.each([&](int thread) {
            if (thread != 0) return;
            s.whole() = whole;
            if (whole.eta > 0) s.note(2, after * whole.scale);
        });
    }

    static DOMERGE_DEVICE void find(const TiledState& s, const Pairs& pairs, Whole& whole,
                                    double& after) {
        Products& products = whole.products;
        const double last = products.kpp;
        products.find(s.of_tiles<kSums>(0, false));
        if (!(products.kpp > 0)) return;
        products.turn(products.beta(last));
        Totals<kCoefficients> quartic = s.of_tiles<kCoefficients>(kSums, true);
        quartic.at[1] *= 2;
        quartic.at[3] *= 2;
        const auto line = pairs.line(quartic, whole.moved, 2 * products.d_change, products.dd);
        const double before = line(0.0).value;
        after = before;
        const double eta = best_step(line, before, &after);
        if (!(eta > 0)) return;
        if (s.params.frobenius) pairs.set_weights(eta);
        whole.eta = eta;
        whole.moved += eta * (2 * products.d_change + eta * products.dd);
        products.d_change += eta * products.dd;
        whole.running = enough(whole.gains, before - after, s.params.tol * after) ? 0 : 1;
    }
};

// What is left of the statistics.
struct Finish {
    static DOMERGE_DEVICE void run(const TiledState& s, const Pairs&) {
        const double energy = s.of_tiles<1>(0, true).at[0];
        s.each([&](int thread) {
            if (thread != 0) return;
            const Whole& whole = s.whole();
            s.note(0, static_cast<double>(whole.gains.count));
            s.note(3, whole.energy_before > 0 ? energy / whole.energy_before : 0.0);
            s.note(4, whole.moved > 0 ? sqrt(whole.moved / s.rank) : 0.0);
        });
    }
};

}  // namespace domerge
