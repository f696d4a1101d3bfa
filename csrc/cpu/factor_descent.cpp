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

constexpr int kHalvings = 60;           // of the error of the start
constexpr double kAlike = 0.01;         // of numbers of which the mean serves all
constexpr double kEstimatedTol = 1e-4;  // below it gains come near the rounding of Grams
constexpr double kDeviations = 3;       // of an estimate, which what it is taken for exceeds
constexpr double kDisagreement = 0.2;   // of a step's estimated gain and what it gained
constexpr int64_t kLarge = 64;  // units of rows and of columns: below it blocks are half as long
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

// A step, what it gains, and the standard error of that.
struct Guess {
    double eta, gain, error;

    bool is_sure(double of) const { return kDeviations * error <= of; }
};

// What a line has besides the Gram's terms: ||Xhat - X||^2 = moved + eta (along + eta square).
struct Change {
    double moved, along, square;

    double by(double eta) const { return eta * (along + eta * square); }
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

    // Makes e_ of what it is for Y + trial Z; `alone`: only of S.
    Terms terms(bool alone, float trial = 1) {
        std::vector<Terms> parts(state_.columns);
        run_(state_.columns, [&](int64_t item, Arena&) {
            const int64_t i = state_.columns - 1 - item;
            kernels_.line(s_.whole, alone ? nullptr : e_.whole, f_.whole, trial, i, parts[i].at);
        });
        Terms sum;
        for (const Terms& part : parts)
            for (int k = 0; k < 6; ++k) sum.at[k] += part.at[k];
        subtract_own(alone, sum);
        return sum;
    }

    void subtract_own(bool alone, Terms& sum) const {
        for (int64_t i = 0; i < own_size_; ++i) {
            const double s = s_.own[i], e = alone ? 0 : e_.own[i], f = alone ? 0 : f_.own[i];
            const double products[6] = {s * s, s * e, e * e, s * f, e * f, f * f};
            for (int k = 0; k < 6; ++k) sum.at[k] -= products[k];
        }
    }

    void note_share(double pairs, FactorStats& stats) const {
        double own = 0;
        for (int64_t i = 0; i < own_size_; ++i) own += double(s_.own[i]) * s_.own[i];
        if (pairs + own > 0) stats.least_share = std::min(stats.least_share, pairs / (pairs + own));
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
        const bool estimates = options_.tol >= kEstimatedTol && state_.d >= kernels_.estimated;
        double old = 0;
        Gains gains{};
        while (stats.steps < options_.steps) {
            double slope = 0;
            const double beta = find_gradient(old, slope);
            // Of a gradient that is rounding alone, the line is, too.
            if (!(old > kernels_.noise * stats.objective_after)) break;
            const Change change = turn(beta);
            own(false);
            note_share(overlap, stats);
            Guess guess{};
            if (estimates) guess = find_guess(overlap, slope, change);
            if (!(guess.gain > 0 && guess.is_sure(guess.gain))) guess.eta = 0;
            double gain = guess.gain;
            const bool is_last = guess.eta > 0 && ends(gains, guess, stats);
            if (is_last) {
                move(guess.eta, change);
                overlap -= gain + options_.gamma * change.by(guess.eta);
            } else {
                gain = take_step(guess, change, overlap);
                if (!(gain >= 0)) break;
            }
            stats.steps += 1;
            stats.objective_after = overlap + options_.gamma * moved_;
            if (is_last || enough(gains, gain, options_.tol * stats.objective_after)) break;
        }
    }

    // Whether a step is the last by its estimate alone, which is sure enough for that.
    bool ends(Gains gains, const Guess& guess, const FactorStats& stats) const {
        const double allowed = options_.tol * (stats.objective_after - guess.gain);
        const bool reached = enough(gains, guess.gain, allowed);
        return (reached || stats.steps + 1 == options_.steps) && guess.is_sure(kLittle * allowed);
    }

    // Sets `norm` to <g, M g>, and returns beta, by Polak and Ribiere; `slope` is that along
    // -M g + beta D.
    double find_gradient(double& norm, double& slope) {
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
        slope = beta * sums[2] - norm;
        return beta;
    }

    Change turn(double beta) {
        std::vector<double> parts(2 * state_.units);
        units([&](int64_t unit, Arena&) {
            kernels_.turn(state_, unit, static_cast<float>(beta), &parts[2 * unit]);
        });
        double sums[2] = {};
        for (int64_t i = 0; i < 2 * state_.units; ++i) sums[i % 2] += parts[i];
        return {moved_, 2 * sums[0], sums[1]};
    }

    // Numbers in one part of the sums of probes. Parts lie in f_, which has room for one where d is
    // above 32.
    int64_t probed() const { return state_.columns * kUnit * 3 * kProbes; }

    // [32 columns and 64 more, kProbes]: the lower bits of columns' numbers, mixed as MurmurHash3
    // ends.
    std::vector<float> signs() const {
        std::vector<float> signs((state_.ld() + 2 * kUnit) * kProbes);
        for (int64_t c = 0; c < state_.d; ++c) {
            uint32_t bits = static_cast<uint32_t>(c + 1);
            bits = (bits ^ bits >> 16) * 0x85ebca6bu;
            bits = (bits ^ bits >> 13) * 0xc2b2ae35u;
            bits ^= bits >> 16;
            for (int64_t p = 0; p < kProbes; ++p)
                signs[c * kProbes + p] = bits >> p & 1 ? -1.0f : 1.0f;
        }
        return signs;
    }

    // What the probes say of the direction: terms [4, kProbes].
    std::vector<double> probe() {
        const std::vector<float> v = signs();
        const int64_t squares = state_.columns * (state_.columns + 1) / 2 * kUnitNumbers;
        const int64_t parts = std::min(squares / probed(), state_.units);
        run_(parts, [&](int64_t part, Arena& arena) {
            float* sums = f_.whole + part * probed();
            std::memset(sums, 0, probed() * sizeof(float));
            for (int64_t unit = part; unit < state_.units; unit += parts) {
                arena.reset();
                poll();
                kernels_.probe(state_, unit, v.data(), sums, arena);
            }
        });
        std::vector<double> found(state_.columns * 4 * kProbes), terms(4 * kProbes);
        run_(state_.columns, [&](int64_t column, Arena&) {
            kernels_.probe_terms(f_.whole + column * kUnit * 3 * kProbes, probed(), parts,
                                 &found[column * 4 * kProbes]);
        });
        for (size_t i = 0; i < found.size(); ++i) terms[i % terms.size()] += found[i];
        return terms;
    }

    // The best step by probes; of no gain where no step lowers the estimate.
    Guess find_guess(double overlap, double slope, const Change& change) {
        const std::vector<double> found = probe();
        const double *ee = &found[0], *sf = ee + kProbes, *ef = sf + kProbes, *ff = ef + kProbes;
        Terms t;
        for (int64_t p = 0; p < kProbes; ++p) {
            t.at[2] += ee[p] / kProbes;
            t.at[3] += sf[p] / kProbes;
            t.at[4] += ef[p] / kProbes;
            t.at[5] += ff[p] / kProbes;
        }
        subtract_own(false, t);
        t.at[0] = overlap;
        t.at[1] = (slope - options_.gamma * change.along) / 2;
        Guess guess{};
        double after = 0;
        guess.eta = best(t, change, guess.gain, after);
        const double eta = guess.eta;
        double sum = 0, squares = 0;
        const auto value = [&](int64_t p) {
            return ((ff[p] * eta + 2 * ef[p]) * eta + ee[p] + 2 * sf[p]) * eta * eta;
        };
        for (int64_t p = 0; p < kProbes; ++p) sum += value(p);
        for (int64_t p = 0; p < kProbes; ++p)
            squares += (value(p) - sum / kProbes) * (value(p) - sum / kProbes);
        guess.error = std::sqrt(squares / (kProbes * (kProbes - 1)));
        return guess;
    }

    // The step along a line of which these are the terms, what it gains and f after it.
    double best(const Terms& t, const Change& change, double& gain, double& after) const {
        double quartic[5] = {t.at[0] / 2, t.at[1], t.at[2] / 2 + t.at[3], t.at[4], t.at[5] / 2};
        double weight = 1, energy = 0;
        const Pairs pairs{
            1, {quartic, quartic + 1, quartic + 2, quartic + 3, quartic + 4}, &weight, &energy};
        const Line line =
            make_line(pairs, false, options_.gamma, change.moved, change.along, change.square);
        const double before = line.at(0.0).value;
        after = before;
        const double eta = best_step(line, &after);
        gain = before - after;
        return eta;
    }

    // Takes the step of a guess, if there is one and it gains what it says, or else the best.
    // Returns what that gains, or -1 where no step lowers the objective.
    double take_step(const Guess& guess, const Change& change, double& overlap) {
        const double trial = guess.eta > 0 ? guess.eta : 1;
        gram(1, static_cast<float>(trial), e_.whole);
        if (guess.eta > 0) {
            const double rise = find_rise(static_cast<float>(trial));
            const double gain = -rise - options_.gamma * change.by(trial);
            if (std::fabs(gain - guess.gain) <= kDisagreement * guess.gain) {
                std::swap(s_.whole, e_.whole);
                advance_own(static_cast<float>(trial));
                move(trial, change);
                overlap += rise;
                return gain;
            }
        }
        gram(0, 1, f_.whole);
        double gain = 0, after = 0;
        const double eta = best(terms(false, static_cast<float>(trial)), change, gain, after);
        if (!(eta > 0)) return -1;
        run_(state_.columns, [&](int64_t i, Arena&) {
            kernels_.advance(s_.whole, e_.whole, f_.whole, i, static_cast<float>(eta));
        });
        advance_own(static_cast<float>(eta));
        move(eta, change);
        overlap = after - options_.gamma * moved_;
        return gain;
    }

    // By how much ||S||^2 - sum_i ||K_i||^2 is more at Y + eta Z, of which e_ is S.
    double find_rise(float eta) {
        std::vector<double> parts(state_.columns);
        run_(state_.columns, [&](int64_t item, Arena&) {
            const int64_t i = state_.columns - 1 - item;
            parts[i] = kernels_.rise(s_.whole, e_.whole, i);
        });
        double rise = 0;
        for (double part : parts) rise += part;
        for (int64_t i = 0; i < own_size_; ++i) {
            const double moved = eta * e_.own[i] + eta * eta * f_.own[i];
            rise -= moved * (2.0 * s_.own[i] + moved);
        }
        return rise;
    }

    void move(double eta, const Change& change) {
        units([&](int64_t unit, Arena&) { kernels_.move(state_, unit, static_cast<float>(eta)); });
        moved_ += change.by(eta);
    }

    void advance_own(float eta) {
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
    double size_ = 1, moved_ = 0;
};

}  // namespace

FactorStats descend_on_factors(const FactorKernels& kernels, const Problem& problem,
                               const DescentOptions& options, float* out, const Run& run,
                               Arena& memory) {
    return Descent(kernels, problem, options, out, run, memory)();
}

}  // namespace domerge
