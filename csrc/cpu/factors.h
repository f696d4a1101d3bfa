// The parts of a descent on the factors themselves, for products of one kind: see factor_kernels.h.
#pragma once

#include "factor_blocks.h"
#include "factor_probes.h"

namespace domerge {
namespace DOMERGE_ISA {

// Calls body(c, n) for the vectors of a row: n numbers from c on, less than a vector at its end.
template <class Body>
DOMERGE_INLINE void for_vectors(int64_t d, Body body) {
    int64_t c = 0;
    for (; c + kWidth <= d; c += kWidth) body(c, int64_t{kWidth});
    if (c < d) body(c, d - c);
}

DOMERGE_INLINE FloatVec load_float(const float* p, int64_t n) {
    return load_some<Float32>(p, n);
}

constexpr int64_t square_at(int64_t i, int64_t j) {
    return (i * (i + 1) / 2 + j) * kUnitNumbers;
}

// Sums of float vectors, in double after a stretch of them.
template <int kSums>
struct Sums {
    FloatVec part[kSums] = {};
    double total[kSums] = {};

    DOMERGE_INLINE void settle() {
        for (int k = 0; k < kSums; ++k) {
            total[k] += sum_lanes(part[k]);
            part[k] = FloatVec{};
        }
    }
};

template <class P>
struct Factors {
    using Number = typename P::Number;
    using Format = typename P::Format;

    static Number* numbers(void* p) { return static_cast<Number*>(p); }

    static double squared_norm(const FactorRow& row, int64_t d) {
        DoubleVec low{}, high{};
        with_dtype(row.dtype, [&](auto format) {
            using X = decltype(format);
            const auto* x = static_cast<const typename X::Storage*>(row.x);
            for_vectors(d, [&](int64_t c, int64_t n) {
                const Widened v = widen(load_some<X>(x + c, n));
                low += v.low * v.low;
                high += v.high * v.high;
            });
        });
        double sum = 0;
        for (int l = 0; l < kLanes<double>; ++l) sum += low[l] + high[l];
        return sum;
    }

    static void place(const FactorState& state, int64_t unit, const float* factors) {
        for (int64_t r = unit * kUnit; r < state.last_row(unit); ++r) {
            const FactorRow& row = state.row[r];
            float* x_hat = state.x_hat + r * state.d;
            const float factor = factors[r];
            with_dtype(row.dtype, [&](auto format) {
                using X = decltype(format);
                const auto* x = static_cast<const typename X::Storage*>(row.x);
                for_vectors(state.d, [&](int64_t c, int64_t n) {
                    const FloatVec v = load_some<X>(x + c, n) * row.scale;
                    store_some<Float32>(x_hat + c, v * factor, n);
                });
            });
        }
    }

    static void pack(const FactorState& state, int64_t unit, float of_position,
                     float of_direction) {
        alignas(64) float block[kUnitNumbers];
        const int64_t first = unit * kUnit, last = state.last_row(unit);
        for (int64_t column = 0; column < state.columns; ++column) {
            for (int64_t k = 0; k < kUnit; ++k) {
                const int64_t r = first + k < last ? first + k : last - 1;
                const float root = first + k < last ? state.row[r].root : 0.0f;
                const float* x_hat = state.x_hat + r * state.d;
                const Number* direction = numbers(state.direction) + r * state.ld();
                for (int64_t i = 0; i < kUnit; i += kWidth) {
                    const int64_t c = column * kUnit + i, n = state.d - c;
                    FloatVec v{};
                    if (of_position != 0.0f && n > 0) v = load_float(x_hat + c, n) * of_position;
                    if (of_direction != 0.0f) v += Format::load(direction + c) * of_direction;
                    store(block + k * kUnit + i, v * root);
                }
            }
            const int64_t at = (column * state.packed + unit - state.first_packed) * kUnitNumbers;
            P::pack_both(block, numbers(state.left) + at, numbers(state.right) + at);
        }
    }

    static void gram(const FactorState& state, int64_t bi, int64_t bj, float* squares) {
        [[maybe_unused]] const typename P::Session session{};
        const int64_t panel = state.packed * kUnitNumbers;
        const int64_t i = bi * state.block_rows, j = bj * state.block_columns;
        const Panels<Number> left{numbers(state.left) + i * panel, panel,
                                  least(state.block_rows, state.columns - i)};
        const Panels<Number> right{numbers(state.right) + j * panel, panel,
                                   least(state.block_columns, state.columns - j)};
        multiply_block<P>(
            left, right, state.packed, j - i, kUnit,
            [&](int64_t k, int64_t l) { return squares + square_at(i + k, j + l); },
            state.first_packed == 0);
    }

    static void pack_squares(const FactorState& state, const float* squares, int64_t j) {
        alignas(64) float turned[kUnitNumbers];
        Number* to = numbers(state.right) + j * state.columns * kUnitNumbers;
        for (int64_t k = 0; k < state.columns; ++k, to += kUnitNumbers) {
            if (k < j) transpose(squares + square_at(j, k), kUnit, kUnit, kUnit, turned, kUnit);
            P::pack_right(k < j ? turned : squares + square_at(k, j), to);
        }
    }

    // The panels of Y's rows, of some units.
    static Panels<Number> pack_strip(const FactorState& state, int64_t first, int64_t units,
                                     Arena& arena) {
        alignas(64) float block[kUnitNumbers];
        const int64_t panel = state.columns * kUnitNumbers;
        Number* left = static_cast<Number*>(arena.take(units * panel * sizeof(Number)));
        for (int64_t s = 0; s < units; ++s) {
            const int64_t begin = (first + s) * kUnit, end = state.last_row(first + s);
            for (int64_t column = 0; column < state.columns; ++column) {
                for (int64_t k = 0; k < kUnit; ++k) {
                    const int64_t r = begin + k < end ? begin + k : end - 1;
                    const float root = begin + k < end ? state.row[r].root : 0.0f;
                    for (int64_t i = 0; i < kUnit; i += kWidth) {
                        const int64_t c = column * kUnit + i, n = state.d - c;
                        const float* at = state.x_hat + r * state.d + c;
                        store(block + k * kUnit + i, n > 0 ? load_float(at, n) * root : FloatVec{});
                    }
                }
                P::pack_rows(block, left + s * panel + column * kUnitNumbers);
            }
        }
        return {left, panel, units};
    }

    static void gradient(const FactorState& state, int64_t strip, double* sums, Arena& arena) {
        const int64_t first = strip * state.block_rows;
        const int64_t units = least(state.block_rows, state.units - first);
        const int64_t panel = state.columns * kUnitNumbers;
        const int64_t ld = row_stride<float>(state.block_columns * kUnit);
        float* ys = static_cast<float*>(arena.take(units * kUnit * ld * sizeof(float)));
        const Panels<Number> left = pack_strip(state, first, units, arena);
        [[maybe_unused]] const typename P::Session session{};
        sums[0] = sums[1] = sums[2] = 0;
        for (int64_t j = 0; j < state.columns; j += state.block_columns) {
            const Panels<Number> right{numbers(state.right) + j * panel, panel,
                                       least(state.block_columns, state.columns - j)};
            multiply_block<P>(left, right, state.columns, -right.count, ld,
                              [&](int64_t s, int64_t k) { return ys + (s * ld + k) * kUnit; });
            const Columns columns{j * kUnit,
                                  least(state.block_columns * kUnit, state.d - j * kUnit)};
            finish_block(state, first * kUnit, state.last_row(first + units - 1), columns, ys, ld,
                         sums);
        }
    }

    struct Columns {
        int64_t first, count;
    };

    // The gradient of some rows and columns, of which ys [rows, ld] is Y S.
    static void finish_block(const FactorState& state, int64_t begin, int64_t end, Columns columns,
                             float* ys, int64_t ld, double* sums) {
        for (int64_t r = begin; r < end;) {
            const int64_t n = least(4, least(end, state.row[r].last) - r);
            float* row = ys + (r - begin) * ld;
            if (n == 4)
                subtract_own<4>(state, r, columns, row, ld);
            else
                for (int64_t k = 0; k < n; ++k)
                    subtract_own<1>(state, r + k, columns, row + k * ld, ld);
            for (int64_t k = 0; k < n; ++k) finish_row(state, r + k, columns, row + k * ld, sums);
            r += n;
        }
    }

    // ys -= K_i Y_i, of some rows of one adapter.
    template <int kRows>
    static DOMERGE_INLINE void subtract_own(const FactorState& state, int64_t r, Columns columns,
                                            float* ys, int64_t ld) {
        const FactorRow* row = state.row + r;
        const float* x_hat = state.x_hat + columns.first;
        for_vectors(columns.count, [&](int64_t c, int64_t n) {
            FloatVec own[kRows] = {};
            for (int64_t b = row->first; b < row->last; ++b) {
                const FloatVec x = load_float(x_hat + b * state.d + c, n);
                for (int k = 0; k < kRows; ++k) own[k] += x * row[k].own[b - row->first];
            }
            for (int k = 0; k < kRows; ++k) {
                float* at = ys + k * ld + c;
                store(at, load<FloatVec>(at) - own[k] * row[k].root);
            }
        });
    }

    // g = 4 root (Y S - K_i Y_i) + 2 gamma (Xhat - X), in place of the last.
    static DOMERGE_INLINE void finish_row(const FactorState& state, int64_t r, Columns columns,
                                          const float* ys, double* sums) {
        const FactorRow& row = state.row[r];
        const float* x_hat = state.x_hat + r * state.d + columns.first;
        Number* gradient = numbers(state.gradient) + r * state.ld() + columns.first;
        const Number* direction = numbers(state.direction) + r * state.ld() + columns.first;
        Sums<3> found;
        with_dtype(row.dtype, [&](auto format) {
            using X = decltype(format);
            const auto* x = static_cast<const typename X::Storage*>(row.x) + columns.first;
            for_vectors(columns.count, [&](int64_t c, int64_t n) {
                const FloatVec change =
                    load_float(x_hat + c, n) - load_some<X>(x + c, n) * row.scale;
                const FloatVec product =
                    n < kWidth ? load_float(ys + c, n) : load<FloatVec>(ys + c);
                const FloatVec g = product * (4 * row.root) + change * (2 * state.gamma);
                found.part[0] += g * g;
                found.part[1] += g * Format::load(gradient + c);
                found.part[2] += g * Format::load(direction + c);
                Format::store(gradient + c, g);
            });
        });
        found.settle();
        sums[0] += found.total[0] * row.step;
        sums[1] += found.total[1] * row.step;
        sums[2] += found.total[2];
    }

    static void turn(const FactorState& state, int64_t unit, float beta, double* sums) {
        sums[0] = sums[1] = 0;
        for (int64_t r = unit * kUnit; r < state.last_row(unit); ++r) {
            const FactorRow& row = state.row[r];
            const float* x_hat = state.x_hat + r * state.d;
            const Number* gradient = numbers(state.gradient) + r * state.ld();
            Number* direction = numbers(state.direction) + r * state.ld();
            Sums<2> found;
            with_dtype(row.dtype, [&](auto format) {
                using X = decltype(format);
                const auto* x = static_cast<const typename X::Storage*>(row.x);
                for_vectors(state.d, [&](int64_t c, int64_t n) {
                    Format::store(direction + c, Format::load(direction + c) * beta -
                                                     Format::load(gradient + c) * row.step);
                    const FloatVec d = Format::load(direction + c);  // as it was rounded
                    found.part[0] +=
                        d * (load_float(x_hat + c, n) - load_some<X>(x + c, n) * row.scale);
                    found.part[1] += d * d;
                });
            });
            found.settle();
            sums[0] += found.total[0];
            sums[1] += found.total[1];
        }
    }

    static void move(const FactorState& state, int64_t unit, float eta) {
        for (int64_t r = unit * kUnit; r < state.last_row(unit); ++r) {
            float* x_hat = state.x_hat + r * state.d;
            const Number* direction = numbers(state.direction) + r * state.ld();
            for_vectors(state.d, [&](int64_t c, int64_t n) {
                const FloatVec moved = load_float(x_hat + c, n) + Format::load(direction + c) * eta;
                store_some<Float32>(x_hat + c, moved, n);
            });
        }
    }

    static void own(const FactorState& state, int64_t first, float* k, float* e, float* f,
                    Arena& arena) {
        constexpr int64_t stretch = 256;  // columns of all rows that stay in L1
        const int64_t rank = state.row[first].last - first, d = state.d;
        const float scale = state.row[first].root * state.row[first].root;
        const int64_t kinds = k ? 1 : 2;
        FloatVec* sums = static_cast<FloatVec*>(arena.take(rank * rank * kinds * sizeof(FloatVec)));
        for (int64_t i = 0; i < rank * rank * kinds; ++i) sums[i] = FloatVec{};
        const auto position = [&](int64_t a) { return state.x_hat + (first + a) * d; };
        const auto direction = [&](int64_t a) {
            return numbers(state.direction) + (first + a) * state.ld();
        };
        for (int64_t begin = 0; begin < d; begin += stretch) {
            const int64_t width = least(stretch, d - begin);
            for (int64_t a = 0; a < rank; ++a) {
                for (int64_t b = 0; b <= a; ++b) {
                    FloatVec* sum = sums + (a * rank + b) * kinds;
                    const float *xa = position(a) + begin, *xb = position(b) + begin;
                    if (k) {
                        for_vectors(width, [&](int64_t c, int64_t n) {
                            sum[0] += load_float(xa + c, n) * load_float(xb + c, n);
                        });
                        continue;
                    }
                    const Number *da = direction(a) + begin, *db = direction(b) + begin;
                    FloatVec mixed{}, square{};
                    for_vectors(width, [&](int64_t c, int64_t n) {
                        const FloatVec za = Format::load(da + c), zb = Format::load(db + c);
                        mixed += load_float(xa + c, n) * zb + za * load_float(xb + c, n);
                        square += za * zb;
                    });
                    sum[0] += mixed;
                    sum[1] += square;
                }
            }
        }
        for (int64_t a = 0; a < rank; ++a) {
            for (int64_t b = 0; b <= a; ++b) {
                const auto found = [&](int64_t kind) {
                    return static_cast<float>(sum_lanes(sums[(a * rank + b) * kinds + kind]) *
                                              scale);
                };
                if (k) {
                    k[a * rank + b] = k[b * rank + a] = found(0);
                } else {
                    e[a * rank + b] = e[b * rank + a] = found(0);
                    f[a * rank + b] = f[b * rank + a] = found(1);
                }
            }
        }
    }

    static double rise(const float* s, const float* next, int64_t i) {
        double sum = 0;
        for (int64_t j = 0; j <= i; ++j) {
            const int64_t at = square_at(i, j);
            Sums<1> found;
            for (int64_t c = at; c < at + kUnitNumbers; c += kWidth) {
                const FloatVec x = load<FloatVec>(s + c), y = load<FloatVec>(next + c);
                found.part[0] += (y - x) * (y + x);
            }
            found.settle();
            sum += (i == j ? 1 : 2) * found.total[0];
        }
        return sum;
    }

    static void line(const float* s, float* e, const float* f, float trial, int64_t i,
                     double* sums) {
        const float square = trial * trial, inverse = 1 / trial;
        for (int k = 0; k < 6; ++k) sums[k] = 0;
        for (int64_t j = 0; j <= i; ++j) {
            const int64_t at = square_at(i, j);
            Sums<6> found;
            for (int64_t c = at; c < at + kUnitNumbers; c += kWidth) {
                const FloatVec x = load<FloatVec>(s + c);
                found.part[0] += x * x;
                if (!e) continue;
                const FloatVec z = load<FloatVec>(f + c);
                const FloatVec y = (load<FloatVec>(e + c) - x - z * square) * inverse;
                store(e + c, y);
                found.part[1] += x * y;
                found.part[2] += y * y;
                found.part[3] += x * z;
                found.part[4] += y * z;
                found.part[5] += z * z;
            }
            found.settle();
            for (int k = 0; k < 6; ++k) sums[k] += (i == j ? 1 : 2) * found.total[k];
        }
    }

    static void advance(float* s, const float* e, const float* f, int64_t i, float eta) {
        const int64_t end = square_at(i + 1, 0);
        for (int64_t c = square_at(i, 0); c < end; c += kWidth)
            store(s + c, load<FloatVec>(s + c) + load<FloatVec>(e + c) * eta +
                             load<FloatVec>(f + c) * (eta * eta));
    }

    static void finish(const FactorState& state, int64_t unit, float size, double* sums) {
        for (int64_t r = unit * kUnit; r < state.last_row(unit); ++r) {
            const FactorRow& row = state.row[r];
            float* x_hat = state.x_hat + r * state.d;
            Sums<2> found;
            with_dtype(row.dtype, [&](auto format) {
                using X = decltype(format);
                const auto* from = static_cast<const typename X::Storage*>(row.x);
                for_vectors(state.d, [&](int64_t c, int64_t n) {
                    const FloatVec x = load_some<X>(from + c, n) * row.scale;
                    const FloatVec moved = load_float(x_hat + c, n);
                    found.part[0] += moved * x;
                    found.part[1] += x * x;
                    store_some<Float32>(x_hat + c, moved * size, n);
                });
            });
            found.settle();
            sums[2 * r] = found.total[0];
            sums[2 * r + 1] = found.total[1];
        }
    }

    static constexpr FactorKernels kernels() {
        return {sizeof(Number),
                P::kNoise,
                P::kPanels,
                P::kBlockRows,
                P::kBlockColumns,
                P::kEstimated,
                squared_norm,
                place,
                pack,
                gram,
                pack_squares,
                gradient,
                turn,
                move,
                own,
                Probes<Format>::probe,
                Probes<Format>::probe_terms,
                rise,
                line,
                advance,
                finish};
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
