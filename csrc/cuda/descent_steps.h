// The descent on R x R matrices, one problem at a time for each thread block, all its steps within
// one launch.
//
// Stored transposed so that products read whole rows of both sides, sum_k L[k][i] R[k][j]: with
// Ct = C^T, M = V o H and Q = D G,  Pt = (Ct M + 2 gamma (Ct - I)) K^-1,  Qt = G Dt,
// Y = Qt^T Ct,  E = Y + Y^T,  F = Qt^T Dt, where K are the curvatures of all rows. H, E and F are
// used below the diagonal blocks only.
//
// A step: 7 R^3 flops in four products, F being symmetric; the first, in which C = I, 3 R^3 in two.
// What is done with a product's entries is done while they are in registers.
#pragma once

#include "descent_penalty.h"

namespace domerge {

template <int kSize>
struct Descent {
    using Params = DescentParams;
    using State = DescentState<kSize>;
    using Product = typename State::Product;
    using Quartic = Totals<kCoefficients>;
    static constexpr int kThreads = State::kThreads;
    static constexpr int kBlocksPerSm = kSize == 16 ? 12 : kSize == 32 ? 5 : 1;
    static constexpr int kLd = State::kLd;

    using Parts = PerThread<Part, kThreads>;

    State& s;
    typename State::Shared& shared;
    DescentPenalty<kSize> penalty;

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const int problems = static_cast<int>(params.problems);
        for (int i = static_cast<int>(block.index); i < problems; i += params.blocks) {
            State state(params, block, i);
            state.begin();
            Descent descent(state);
            descent.descend();
            descent.finish();
        }
    }

    DOMERGE_DEVICE explicit Descent(State& state)
        : s(state), shared(state.shared), penalty(state) {}

    // The products of a step, by one piece of code: its compilation is what takes time.
    //     0  Pt = (Ct M + 2 gamma (Ct - I)) K^-1
    //     1  G Pt, after which the direction is turned
    //     2  Y = D G C^T
    //     3  F = D G D^T, and E
    // False where the gradient is zero; otherwise `parts` are of the squared penalty's quartic.
    DOMERGE_DEVICE bool find_direction(bool first, Products& products, Parts& parts) {
        DOMERGE_ROLLED
        for (int product = 0; product < 4; ++product) {
            s.each([&](int thread) { parts[thread] = Part{}; });
            if (!first || product % 2 == 1)
                multiply(product, first, parts);
            else if (product == 0)
                precondition();
            if (product == 1) {
                const double last = products.kpp;
                products.find(add_up<kSums>(parts));
                if (!(products.kpp > 0)) return false;
                turn(products, last);
            }
        }
        return true;
    }

    template <int kCount>
    DOMERGE_DEVICE Totals<kCount> add_up(Parts& parts) const {
        return s.template total<kCount>([&](int thread, double (&sums)[kCount]) {
            DOMERGE_UNROLL
            for (int k = 0; k < kCount; ++k) sums[k] = parts[thread].at[k];
        });
    }

    DOMERGE_DEVICE Quartic find_quartic(Parts& parts) const {
        Quartic quartic = add_up<kCoefficients>(parts);
        quartic.at[1] *= 2;
        quartic.at[3] *= 2;
        return quartic;
    }

    // The first step's Pt, C being I.
    DOMERGE_DEVICE void precondition() const {
        s.each([&](int thread) {
            const float* const m = s.weighted();
            float* const pt = s.pt();
            for_quads<kSize, kThreads>(thread, [&](int row, int column) {
                Vec<4> p = load(m + row * kLd + column);
                const Vec<4> steps = load(shared.step + column);
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) p.at[c] *= steps.at[c];
                store(pt + row * kLd + column, p);
            });
        });
    }

    DOMERGE_DEVICE void multiply(int product, bool first, Parts& parts) {
        const typename Product::Operands operands{product == 0   ? s.ct()
                                                  : product == 1 ? s.gram()
                                                                 : s.qt(),
                                                  product == 0   ? s.weighted()
                                                  : product == 1 ? s.pt()
                                                  : product == 2 ? s.ct()
                                                                 : s.dt(),
                                                  product == 0, product == 3};
        const int depth = (s.rank + 7) / 8 * 8;
        DOMERGE_ROLLED
        for (int begin = 0; begin < kSize; begin += Product::kRegion) {
            PerWarp<typename Product::Sums, kThreads> found;
            Product::multiply(s.block, shared.panels, State::shared_bytes(s.params.resident),
                              operands, depth, begin, found);
            s.each([&](int thread) {
                const auto& own = found[thread / kLanesOfWarp];
                if (product == 0)
                    put_gradient(thread, begin, own);
                else if (product == 1)
                    put_turned_gradient(thread, begin, own, parts[thread]);
                else if (product == 2)
                    put(thread, begin, own, s.next());
                else
                    put_changes(thread, begin, own, first ? s.qt() : s.next(), parts[thread]);
            });
        }
    }

    DOMERGE_DEVICE void put(int thread, int begin, const typename Product::Sums& found,
                            float* out) const {
        Product::for_rows(thread, begin, s.rank, kSize, found, [&](int row, auto pairs) {
            pairs([&](int column, Vec<2> pair) { store(out + row * kLd + column, pair); });
        });
    }

    DOMERGE_DEVICE void put_gradient(int thread, int begin,
                                     const typename Product::Sums& found) const {
        const float pull = static_cast<float>(2 * s.params.gamma);
        const float* const ct = s.ct();
        float* const pt = s.pt();
        Product::for_rows(thread, begin, s.rank, kSize, found, [&](int row, auto pairs) {
            pairs([&](int column, Vec<2> pair) {
                const int at = row * kLd + column;
                const Vec<2> change = s.change(load<2>(ct + at), row, column),
                             steps = load<2>(shared.step + column);
                DOMERGE_UNROLL
                for (int c = 0; c < 2; ++c)
                    pair.at[c] = (pair.at[c] + change.at[c] * pull) * steps.at[c];
                store(pt + at, pair);
            });
        });
    }

    // G Pt in place of the last Pt, and its products with what is known.
    DOMERGE_DEVICE void put_turned_gradient(int thread, int begin,
                                            const typename Product::Sums& found, Part& sums) const {
        const float *const pt = s.pt(), *const dt = s.dt(), *const ct = s.ct();
        float* const next = s.next();
        Product::for_rows(thread, begin, s.rank, kSize, found, [&](int row, auto pairs) {
            pairs([&](int column, Vec<2> q) {
                const int at = row * kLd + column;
                const Vec<2> p = load<2>(pt + at), old = load<2>(next + at), d = load<2>(dt + at),
                             change = s.change(load<2>(ct + at), row, column),
                             k = load<2>(shared.curvature + column);
                DOMERGE_UNROLL
                for (int c = 0; c < 2; ++c) {
                    add_gradient(sums, k.at[c], p.at[c], q.at[c], q.at[c], old.at[c], d.at[c],
                                 change.at[c]);
                }
                store(next + at, q);
            });
        });
    }

    // Below the diagonal: E in place of Y and F^T above it, and the coefficients of the sum of
    // ||H_ij + eta E_ij + eta^2 F_ij||^2 / (n_i n_j).
    DOMERGE_DEVICE void put_changes(int thread, int begin, const typename Product::Sums& found,
                                    const float* y, Part& sums) const {
        const float* const h = s.h();
        float* const next = s.next();
        Product::for_rows(
            thread, begin, s.rank, Product::half(begin), found, [&](int row, auto pairs) {
                pairs([&](int column, Vec<2> f) {
                    const int below = row * kLd + column, above = column * kLd + row;
                    const bool wanted = row > column, both = row > column + 1;
                    const Vec<2> x = wanted ? load<2>(h + below) : Vec<2>{},
                                 n = load<2>(shared.inverse + column);
                    Vec<2> e = wanted ? load<2>(y + below) : Vec<2>{};
                    e.at[0] += wanted ? y[above] : 0.0f;
                    e.at[1] += both ? y[above + kLd] : 0.0f;
                    if (wanted)
                        store(next + below, e);  // with an entry of the diagonal, if not both
                    if (wanted) next[above] = f.at[0];
                    if (both) next[above + kLd] = f.at[1];
                    DOMERGE_UNROLL
                    for (int c = 0; c < 2; ++c) {
                        const bool counts = (c == 0 ? wanted : both) &&
                                            shared.owner[row] != shared.owner[column + c];
                        const float w = counts ? shared.inverse[row] * n.at[c] : 0.0f;
                        add_quartic(sums.at, x.at[c], e.at[c], f.at[c], w);
                    }
                });
            });
    }

    // D = -P + beta D by Polak and Ribiere, and Q = D G by the same recurrence.
    DOMERGE_DEVICE void turn(Products& products, double kpp_old) const {
        const double beta = products.beta(kpp_old);
        products.turn(beta);
        const float b = static_cast<float>(beta);
        s.each([&](int thread) {
            const float *const pt = s.pt(), *const next = s.next();
            float *const dt = s.dt(), *const qt = s.qt();
            for_quads<kSize, kThreads>(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                const Vec<4> p = load(pt + at), qp = load(next + at);
                Vec<4> d = load(dt + at), q = load(qt + at);
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    d.at[c] = d.at[c] * b - p.at[c];
                    q.at[c] = q.at[c] * b - qp.at[c];
                }
                store(dt + at, d);
                store(qt + at, q);
            });
        });
    }

    // C += eta D and H += eta E + eta^2 F.
    DOMERGE_DEVICE void take_step(double step) {
        const float eta = static_cast<float>(step), square = static_cast<float>(step * step);
        s.each([&](int thread) {
            const float *const dt = s.dt(), *const next = s.next();
            float *const ct = s.ct(), *const h = s.h();
            for_quads<kSize, kThreads>(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                const Vec<4> d = load(dt + at);
                Vec<4> c = load(ct + at);
                DOMERGE_UNROLL
                for (int k = 0; k < 4; ++k) c.at[k] += d.at[k] * eta;
                store(ct + at, c);
            });
            s.for_lower(thread, [&](int row, int column) {
                Vec<4> flipped[4];
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) flipped[c] = load(next + (column + c) * kLd + row);
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int at = (row + r) * kLd + column;
                    const Vec<4> y = load(next + at);
                    Vec<4> x = load(h + at);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c)
                        x.at[c] += y.at[c] * eta + flipped[c].at[r] * square;
                    store(h + at, x);
                }
            });
        });
        s.swapped = !s.swapped;
    }

    // The descent from C = I; leaves C in ct.
    DOMERGE_DEVICE void descend() {
        if (s.params.frobenius) penalty.find_floors();
        const Totals<2> energies = penalty.energies();
        const double energy_before = energies.at[0];
        const double objective = penalty.find_line({{energies.at[1]}}, 0, 0, 0)(0.0).value;
        note(1, objective * shared.scale);
        note(2, objective * shared.scale);
        if (s.params.frobenius) penalty.set_weights(0.0);
        double moved = 0.0;
        Gains gains{};
        Products products{};
        while (energy_before > 0 && gains.count < s.params.steps) {
            const bool first = gains.count == 0;
            penalty.weigh();
            if (first) penalty.find_curvatures();
            Parts parts;
            if (!find_direction(first, products, parts)) break;
            const auto line =
                penalty.find_line(find_quartic(parts), moved, 2 * products.d_change, products.dd);
            const double before = line(0.0).value;
            double after = before;
            const double eta = best_step(line, before, &after);
            if (!(eta > 0)) break;
            take_step(eta);
            if (s.params.frobenius) penalty.set_weights(eta);
            moved += eta * (2 * products.d_change + eta * products.dd);
            products.d_change += eta * products.dd;
            note(2, after * shared.scale);
            if (enough(gains, before - after, s.params.tol * after)) break;
        }
        note(0, static_cast<double>(gains.count));
        note(3, energy_before > 0 ? penalty.energies().at[0] / energy_before : 0.0);
        note(4, moved > 0 ? sqrt(moved / s.rank) : 0.0);
    }

    // One of the problem's statistics.
    DOMERGE_DEVICE void note(int place, double value) const {
        s.each([&](int thread) {
            if (thread == 0) s.params.stats[5 * s.work(5) + place] = value;
        });
    }

    DOMERGE_DEVICE void finish() const {
        s.each([&](int thread) {
            float* const out = s.params.out + s.work(4);
            const float* const ct = s.ct();
            DOMERGE_ROLLED
            for (int i = thread; i < s.rank * s.rank; i += kThreads)
                out[i] = ct[i % s.rank * kLd + i / s.rank];
        });
    }
};

}  // namespace domerge
