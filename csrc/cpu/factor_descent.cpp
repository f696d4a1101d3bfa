#include "factor_descent.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define DOMERGE_ISA factor_descent
#include "line_search.h"

namespace domerge {

namespace {

using factor_descent::best_step;
using factor_descent::Line;
using factor_descent::make_line;
using factor_descent::Pairs;

constexpr int kHalvings = 60;    // of the error of the start
constexpr double kAlike = 0.01;  // of numbers of which the mean serves all
constexpr int64_t kLarge = 64;   // units of rows and of columns: below it blocks are half as long
                                 // on both sides, so that there are some for every thread

int64_t size_of(DType dtype) {
    return dtype == DType::float32 ? 4 : 2;
}

constexpr int64_t kPacked = 64;  // units of rows, or as many as of columns: the panels of S then
                                 // are as large; whole stretches of every kind of product

// The symmetric matrices of all adapters, one after the other, of what lies in [d, d] as a sum.
struct Matrix {
    float* whole;
    float* own;
};

// Sums of a line's terms over all squares less those over the adapters' own blocks.
struct Terms {
    double at[6] = {};
};

class Descent {
 public:
    Descent(const FactorKernels& kernels, const Problem& problem, const DescentOptions& options,
            float* out, const Run& run, Arena& memory)
        : kernels_(kernels), options_(options), run_(run) {
        state_.rows = problem.rank;
        state_.d = problem.d;
        state_.units = (problem.rank + kUnit - 1) / kUnit;
        state_.columns = (problem.d + kUnit - 1) / kUnit;
        const int64_t parts = std::min(state_.units, state_.columns) < kLarge ? 2 : 1;
        state_.block_rows = kernels.block_rows / parts;
        state_.block_columns = kernels.block_columns / parts;
        state_.gamma = static_cast<float>(options.gamma);
        state_.x_hat = out;
        take(problem, memory);
        describe(problem);
    }

    FactorStats operator()() {
        FactorStats stats{};
        stats.least_share = 1;
        place(std::vector<double>(norm_.size(), 1.0));
        if (interfering() > 1) descend(stats);
        finish(stats);
        return stats;
    }

 private:
    void take(const Problem& problem, Arena& memory) {
        const int64_t squares = state_.columns * (state_.columns + 1) / 2 * kUnitNumbers;
        const int64_t panels = std::max(std::min(most_packed(), state_.units), state_.columns) *
                               state_.columns * kUnitNumbers * kernels_.number_bytes;
        const int64_t moved = state_.rows * state_.ld() * kernels_.number_bytes;
        int64_t own = 0;
        for (int64_t b = 0; b < problem.count; ++b)
            own += problem.blocks[b].rank * problem.blocks[b].rank;
        own_size_ = (own + 15) / 16 * 16;
        const bool two = kernels_.panels == 2;
        memory.reset();
        char* at = static_cast<char*>(
            memory.take(3 * 4 * (squares + own_size_) + (two ? 2 : 1) * panels + 2 * moved));
        const auto next = [&](int64_t bytes) {
            char* piece = at;
            at += bytes;
            return piece;
        };
        for (Matrix* m : {&s_, &e_, &f_}) {
            m->whole = reinterpret_cast<float*>(next(4 * squares));
            m->own = reinterpret_cast<float*>(next(4 * own_size_));
        }
        state_.right = next(panels);
        state_.left = two ? next(panels) : state_.right;
        state_.direction = next(moved);
        state_.gradient = next(moved);
        std::memset(state_.direction, 0, 2 * moved);
        for (const Matrix& m : {s_, e_, f_}) std::memset(m.own, 0, 4 * own_size_);
    }

    // The rows, with X scaled to a mean square of 1 a row, and the adapters' norms.
    void describe(const Problem& problem) {
        rows_.resize(problem.rank);
        state_.row = rows_.data();
        int64_t r = 0, own = 0;
        for (int64_t b = 0; b < problem.count; ++b) {
            const Block& block = problem.blocks[b];
            const int64_t first = r, last = r + block.rank;
            first_.push_back(first);
            own_at_.push_back(own);
            for (; r < last; ++r, own += block.rank)
                rows_[r] = FactorRow{static_cast<const char*>(block.data) +
                                         (r - first) * block.pitch * size_of(block.dtype),
                                     block.dtype,
                                     static_cast<float>(block.scale),
                                     0,
                                     0,
                                     first,
                                     last,
                                     s_.own + own};
        }
        std::vector<double> squares(problem.rank);
        units([&](int64_t unit, Arena&) {
            for (int64_t i = unit * kUnit; i < state_.last_row(unit); ++i)
                squares[i] =
                    kernels_.squared_norm(rows_[i], state_.d) * rows_[i].scale * rows_[i].scale;
        });
        double total = 0;
        for (double square : squares) total += square;
        size_ = total > 0 ? std::sqrt(total / problem.rank) : 1.0;
        double largest = 0;
        for (int64_t b = 0; b < problem.count; ++b) {
            double sum = 0;
            for (int64_t i = first_[b]; i < rows_[first_[b]].last; ++i) sum += squares[i];
            norm_.push_back(std::sqrt(sum) / size_);
            largest = std::max(largest, norm_.back());
        }
        for (size_t b = 0; b < norm_.size(); ++b) {
            if (norm_[b] <= kNegligible * largest) norm_[b] = 0;
            for (int64_t i = first_[b]; i < rows_[first_[b]].last; ++i) {
                rows_[i].scale = static_cast<float>(rows_[i].scale / size_);
                rows_[i].root = norm_[b] > 0 ? static_cast<float>(1 / std::sqrt(norm_[b])) : 0.0f;
            }
        }
    }

    int64_t interfering() const {
        return std::count_if(norm_.begin(), norm_.end(), [](double n) { return n > 0; });
    }

    template <class Each>
    void units(const Each& each) {
        run_(state_.units, each);
    }

    // Xhat_i = factors_i X_i.
    void place(const std::vector<double>& factors) {
        std::vector<float> of_row(state_.rows);
        for (size_t b = 0; b < factors.size(); ++b)
            for (int64_t r = first_[b]; r < rows_[first_[b]].last; ++r)
                of_row[r] = static_cast<float>(factors[b]);
        units([&](int64_t unit, Arena&) { kernels_.place(state_, unit, of_row.data()); });
    }

    int64_t most_packed() const {
        return (std::max(state_.columns, kPacked) + kPacked - 1) / kPacked * kPacked;
    }

    // squares = Y^T Y with Y = root (of_position Xhat + of_direction D).
    void gram(float of_position, float of_direction, float* squares) {
        for (int64_t first = 0; first < state_.units; first += state_.packed) {
            state_.first_packed = first;
            state_.packed = std::min(most_packed(), state_.units - first);
            run_(state_.packed, [&](int64_t unit, Arena&) {
                kernels_.pack(state_, first + unit, of_position, of_direction);
            });
            add_packed(squares);
        }
    }

    void add_packed(float* squares) {
        const int64_t rows = state_.block_rows, columns = state_.block_columns;
        std::vector<std::pair<int64_t, int64_t>> items;
        for (int64_t i = (state_.columns - 1) / rows; i >= 0; --i)
            for (int64_t j = 0; j * columns < (i + 1) * rows; ++j) items.emplace_back(i, j);
        run_(items.size(), [&](int64_t item, Arena&) {
            kernels_.gram(state_, items[item].first, items[item].second, squares);
        });
    }

    // K_i of the position, or E_i and F_i of the direction.
    void own(bool of_position) {
        run_(norm_.size(), [&](int64_t b, Arena& arena) {
            const int64_t at = own_at_[b];
            kernels_.own(state_, first_[b], of_position ? s_.own + at : nullptr, e_.own + at,
                         f_.own + at, arena);
        });
    }

    // Makes e_ of what it is for Y + Z; `alone`: only of S.
    Terms terms(bool alone) {
        std::vector<Terms> parts(state_.columns);
        run_(state_.columns, [&](int64_t item, Arena&) {
            const int64_t i = state_.columns - 1 - item;
            kernels_.line(s_.whole, alone ? nullptr : e_.whole, f_.whole, i, parts[i].at);
        });
        Terms sum;
        for (const Terms& part : parts)
            for (int k = 0; k < 6; ++k) sum.at[k] += part.at[k];
        whole_ = sum.at[0];
        for (int64_t i = 0; i < own_size_; ++i) {
            const double s = s_.own[i], e = alone ? 0 : e_.own[i], f = alone ? 0 : f_.own[i];
            const double products[6] = {s * s, s * e, e * e, s * f, e * f, f * f};
            for (int k = 0; k < 6; ++k) sum.at[k] -= products[k];
        }
        return sum;
    }

    void note_share(double pairs, FactorStats& stats) {
        if (whole_ > 0) stats.least_share = std::min(stats.least_share, pairs / whole_);
    }

    // Of the factors alpha_i X_i those that are best if all X_i were directions at random, with as
    // much overlap in all as these have: alpha_i = 1 / (1 + 2 / (gamma n_i) sum_{j != i}
    // alpha_j^2 n_j / d); their mean for all where they differ by less than kAlike.
    std::vector<double> mean_field(double overlap) const {
        double sum = 0, squares = 0;
        for (double n : norm_) {
            sum += n;
            squares += n * n;
        }
        const double per_pair = overlap / (sum * sum - squares);  // 1 / d
        std::vector<double> alpha(norm_.size(), 1.0);
        for (int k = 0; k < kHalvings; ++k) {
            double all = 0;
            for (size_t i = 0; i < alpha.size(); ++i) all += alpha[i] * alpha[i] * norm_[i];
            for (size_t i = 0; i < alpha.size(); ++i) {
                if (!(norm_[i] > 0)) continue;
                const double others = all - alpha[i] * alpha[i] * norm_[i];
                const double best = 1 / (1 + 2 / (options_.gamma * norm_[i]) * per_pair * others);
                alpha[i] = (alpha[i] + best) / 2;
            }
        }
        return level(alpha);
    }

    std::vector<double> level(std::vector<double> alpha) const {
        double sum = 0, least = 1, most = 0;
        for (size_t i = 0; i < alpha.size(); ++i) {
            if (!(norm_[i] > 0)) continue;
            sum += alpha[i];
            least = std::min(least, alpha[i]);
            most = std::max(most, alpha[i]);
        }
        if (most <= (1 + kAlike) * least)
            for (size_t i = 0; i < alpha.size(); ++i)
                if (norm_[i] > 0) alpha[i] = sum / interfering();
        return alpha;
    }

    // From X, whose S is known, to the best of its scalings, if that is better. Returns the
    // overlap.
    double start(double overlap) {
        if (!(options_.gamma > 0)) return overlap;
        const std::vector<double> alpha = mean_field(overlap);
        double moved = 0;
        for (size_t i = 0; i < alpha.size(); ++i)
            moved += (1 - alpha[i]) * (1 - alpha[i]) * norm_[i] * norm_[i];
        if (const double factor = common(alpha); factor > 0)
            return start_at(factor, alpha, overlap, moved);
        place(alpha);
        gram(1, 0, e_.whole);
        std::swap(s_.whole, e_.whole);
        std::vector<float> own(s_.own, s_.own + own_size_);
        scale_own(alpha);
        const double found = terms(true).at[0];
        if (found + options_.gamma * moved < overlap) {
            moved_ = moved;
            alpha_ = alpha;
            return found;
        }
        std::swap(s_.whole, e_.whole);
        std::copy(own.begin(), own.end(), s_.own);
        place(alpha_);
        return overlap;
    }

    // The factor of all adapters that interfere, or 0 where they have several.
    double common(const std::vector<double>& alpha) const {
        double factor = 0;
        for (size_t i = 0; i < alpha.size(); ++i) {
            if (!(norm_[i] > 0)) continue;
            if (factor > 0 && alpha[i] != factor) return 0;
            factor = alpha[i];
        }
        return factor;
    }

    // As `start`, with one factor: S is that of X, times its square.
    double start_at(double factor, const std::vector<double>& alpha, double overlap, double moved) {
        const double square = factor * factor, found = square * square * overlap;
        if (!(found + options_.gamma * moved < overlap)) return overlap;
        place(alpha);
        const int64_t numbers = state_.columns * (state_.columns + 1) / 2 * kUnitNumbers;
        for (int64_t i = 0; i < numbers; ++i) s_.whole[i] *= static_cast<float>(square);
        scale_own(alpha);
        moved_ = moved;
        alpha_ = alpha;
        return found;
    }

    void scale_own(const std::vector<double>& alpha) {
        for (size_t b = 0; b < alpha.size(); ++b) {
            const int64_t rank = rows_[first_[b]].last - first_[b];
            for (int64_t i = 0; i < rank * rank; ++i)
                s_.own[own_at_[b] + i] *= static_cast<float>(alpha[b] * alpha[b]);
        }
    }

    // 1 / (2 gamma + 4 tr(S) / (n_i d)): the mean curvature of an adapter's rows.
    void precondition() {
        double trace = 0;
        for (size_t b = 0; b < norm_.size(); ++b) trace += alpha_[b] * alpha_[b] * norm_[b];
        for (size_t b = 0; b < norm_.size(); ++b) {
            if (!(norm_[b] > 0)) continue;
            const double curvature = 2 * options_.gamma + 4 * trace / (norm_[b] * state_.d);
            for (int64_t r = first_[b]; r < rows_[first_[b]].last; ++r)
                rows_[r].step = static_cast<float>(1 / curvature);
        }
    }

    void descend(FactorStats& stats) {
        own(true);
        gram(1, 0, s_.whole);
        const double before = terms(true).at[0];
        note_share(before, stats);
        stats.objective_before = stats.objective_after = before;
        alpha_.assign(norm_.size(), 1.0);
        double overlap = before;
        if (options_.steps > 0 && before > 0) {
            overlap = start(before);
            precondition();
            stats.objective_after = overlap + options_.gamma * moved_;
            iterate(stats, overlap);
        }
        stats.cross_left = before > 0 ? overlap / before : 0.0;
        stats.objective_before *= size_ * size_;
        stats.objective_after *= size_ * size_;
    }

    void iterate(FactorStats& stats, double& overlap) {
        double old = 0;
        Gains gains{};
        for (int64_t step = 0; step < options_.steps; ++step) {
            const double beta = find_gradient(old);
            // Of a gradient that is rounding alone, the line is, too.
            if (!(old > kernels_.noise * stats.objective_after)) break;
            const double gain = find_step(beta, overlap, stats);
            if (!(gain >= 0)) break;
            stats.steps += 1;
            if (enough(gains, gain, options_.tol * stats.objective_after)) break;
        }
    }

    // Sets `norm` to <g, M g>, and returns beta, by Polak and Ribiere.
    double find_gradient(double& norm) {
        run_(state_.columns,
             [&](int64_t j, Arena&) { kernels_.pack_squares(state_, s_.whole, j); });
        const int64_t strips = (state_.units + state_.block_rows - 1) / state_.block_rows;
        std::vector<double> parts(3 * strips);
        run_(strips, [&](int64_t strip, Arena& arena) {
            kernels_.gradient(state_, strip, &parts[3 * strip], arena);
        });
        double sums[3] = {};
        for (int64_t i = 0; i < 3 * strips; ++i) sums[i % 3] += parts[i];
        double beta = norm > 0 ? (sums[0] - sums[1]) / norm : 0.0;
        if (!(beta > 0) || beta * sums[2] >= sums[0]) beta = 0;
        norm = sums[0];
        return beta;
    }

    // Moves along the direction; returns what that gains, or -1 where no step lowers the objective.
    double find_step(double beta, double& overlap, FactorStats& stats) {
        std::vector<double> parts(2 * state_.units);
        units([&](int64_t unit, Arena&) {
            kernels_.turn(state_, unit, static_cast<float>(beta), &parts[2 * unit]);
        });
        double sums[2] = {};
        for (int64_t i = 0; i < 2 * state_.units; ++i) sums[i % 2] += parts[i];
        gram(0, 1, f_.whole);
        gram(1, 1, e_.whole);
        own(false);
        const Terms t = terms(false);
        note_share(t.at[0], stats);
        double quartic[5] = {t.at[0] / 2, t.at[1], t.at[2] / 2 + t.at[3], t.at[4], t.at[5] / 2};
        double weight = 1, energy = 0;
        const Pairs pairs{
            1, {quartic, quartic + 1, quartic + 2, quartic + 3, quartic + 4}, &weight, &energy};
        const Line line = make_line(pairs, false, options_.gamma, moved_, 2 * sums[0], sums[1]);
        const double before = line.at(0.0).value;
        double after = before;
        const double eta = best_step(line, &after);
        if (!(eta > 0)) return -1;
        advance(static_cast<float>(eta));
        moved_ += eta * (2 * sums[0] + eta * sums[1]);
        overlap = after - options_.gamma * moved_;
        stats.objective_after = after;
        return before - after;
    }

    void advance(float eta) {
        units([&](int64_t unit, Arena&) { kernels_.move(state_, unit, eta); });
        run_(state_.columns,
             [&](int64_t i, Arena&) { kernels_.advance(s_.whole, e_.whole, f_.whole, i, eta); });
        for (int64_t i = 0; i < own_size_; ++i)
            s_.own[i] += eta * e_.own[i] + eta * eta * f_.own[i];
    }

    void finish(FactorStats& stats) {
        std::vector<double> sums(2 * state_.rows);
        units([&](int64_t unit, Arena&) {
            kernels_.finish(state_, unit, static_cast<float>(size_), sums.data());
        });
        double scaled = 0, total = 0;
        for (size_t b = 0; b < norm_.size(); ++b) {
            double mixed = 0, square = 0;
            for (int64_t r = first_[b]; r < rows_[first_[b]].last; ++r) {
                mixed += sums[2 * r];
                square += sums[2 * r + 1];
            }
            total += square;
            if (square > 0) scaled += (mixed - square) * (mixed - square) / square;
        }
        if (moved_ > 0) stats.scaled = std::min(1.0, scaled / moved_);
        if (total > 0 && moved_ > 0) stats.change = std::sqrt(moved_ / total);
    }

    const FactorKernels& kernels_;
    const DescentOptions& options_;
    const Run& run_;
    FactorState state_{};
    std::vector<FactorRow> rows_;
    std::vector<int64_t> first_, own_at_;  // of every adapter: its first row, its own matrix
    std::vector<double> norm_, alpha_;     // n_i, 0 if negligible; what the start scales X_i by
    int64_t own_size_ = 0;
    Matrix s_{}, e_{}, f_{};
    double size_ = 1, whole_ = 0, moved_ = 0;
};

}  // namespace

FactorStats descend_on_factors(const FactorKernels& kernels, const Problem& problem,
                               const DescentOptions& options, float* out, const Run& run,
                               Arena& memory) {
    return Descent(kernels, problem, options, out, run, memory)();
}

}  // namespace domerge
