// Products of Y = root Xhat, Z = root D and S with vectors of signs V [d, kProbes]: see
// factor_kernels.h. In float32, whatever other products are made in.
#pragma once

#include "factor_blocks.h"

namespace domerge {
namespace DOMERGE_ISA {

template <class Format>
class Probes {
    using Number = typename Format::Storage;

    static constexpr int64_t kVectors = kProbes / kWidth;  // of a row of V
    static constexpr int64_t kRows = 8 / kVectors;         // of which sums are in registers
    static constexpr int64_t kColumns = 4 / kVectors;
    static constexpr int64_t kChunk = 64;  // columns of all rows that stay in L1

    struct Row {
        FloatVec at[kVectors];
    };

    static DOMERGE_INLINE Row load_row(const float* p) {
        Row row;
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) row.at[v] = load<FloatVec>(p + v * kWidth);
        return row;
    }

    static DOMERGE_INLINE void add(Row& sum, const Row& row, float factor) {
        const FloatVec f = broadcast(factor);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) sum.at[v] += row.at[v] * f;
    }

    static DOMERGE_INLINE void store_row(float* p, const Row& row) {
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) store(p + v * kWidth, row.at[v]);
    }

    // Columns [begin, begin + kChunk) of Y's rows, then of Z's: [2 kUnit, kChunk].
    static void load_chunk(const FactorState& state, int64_t unit, int64_t begin, float* chunk) {
        const int64_t first = unit * kUnit, last = state.last_row(unit);
        for (int64_t k = 0; k < kUnit; ++k, chunk += kChunk) {
            const int64_t r = first + k < last ? first + k : last - 1;
            const float root = first + k < last ? state.row[r].root : 0.0f;
            const float* x_hat = state.x_hat + r * state.d;
            const Number* direction = static_cast<const Number*>(state.direction) + r * state.ld();
            for (int64_t c = 0; c < kChunk; c += kWidth) {
                const int64_t n = state.d - begin - c;
                FloatVec y{}, z{};
                if (n > 0) {
                    y = load_some<Float32>(x_hat + begin + c, n) * root;
                    z = Format::load(direction + begin + c) * root;
                }
                store(chunk + c, y);
                store(chunk + kUnit * kChunk + c, z);
            }
        }
    }

    // products [2 kUnit, kProbes] += chunk V.
    static void multiply(const float* chunk, const float* signs, float* products) {
        for (int64_t r = 0; r < 2 * kUnit; r += kRows) {
            Row sum[kRows];
            for (int64_t k = 0; k < kRows; ++k) sum[k] = load_row(products + (r + k) * kProbes);
            for (int64_t c = 0; c < kChunk; ++c) {
                const Row v = load_row(signs + c * kProbes);
#pragma GCC unroll 8
                for (int64_t k = 0; k < kRows; ++k) add(sum[k], v, chunk[(r + k) * kChunk + c]);
            }
            for (int64_t k = 0; k < kRows; ++k) store_row(products + (r + k) * kProbes, sum[k]);
        }
    }

    // sums [columns, 3, kProbes] += Y^T P, Y^T Q + Z^T P, Z^T Q of the chunk's columns.
    static void multiply_turned(const float* chunk, const float* products, int64_t columns,
                                float* sums) {
        for (int64_t c = 0; c < columns; c += kColumns) {
            Row sum[kColumns][3];
            float* to = sums + c * 3 * kProbes;
            for (int64_t k = 0; k < kColumns; ++k)
                for (int64_t s = 0; s < 3; ++s) sum[k][s] = load_row(to + (3 * k + s) * kProbes);
            for (int64_t r = 0; r < kUnit; ++r) {
                const Row p = load_row(products + r * kProbes);
                const Row q = load_row(products + (kUnit + r) * kProbes);
#pragma GCC unroll 4
                for (int64_t k = 0; k < kColumns; ++k) {
                    const float y = chunk[r * kChunk + c + k];
                    const float z = chunk[(kUnit + r) * kChunk + c + k];
                    add(sum[k][0], p, y);
                    add(sum[k][1], q, y);
                    add(sum[k][1], p, z);
                    add(sum[k][2], q, z);
                }
            }
            for (int64_t k = 0; k < kColumns; ++k)
                for (int64_t s = 0; s < 3; ++s) store_row(to + (3 * k + s) * kProbes, sum[k][s]);
        }
    }

 public:
    static void probe(const FactorState& state, int64_t unit, const float* signs, float* sums,
                      Arena& arena) {
        float* chunk = static_cast<float*>(arena.take(2 * kUnit * kChunk * sizeof(float)));
        float* products = static_cast<float*>(arena.take(2 * kUnit * kProbes * sizeof(float)));
        for (int64_t i = 0; i < 2 * kUnit * kProbes; ++i) products[i] = 0;
        for (int64_t c = 0; c < state.ld(); c += kChunk) {
            load_chunk(state, unit, c, chunk);
            multiply(chunk, signs + c * kProbes, products);
        }
        for (int64_t c = 0; c < state.ld(); c += kChunk) {
            load_chunk(state, unit, c, chunk);
            multiply_turned(chunk, products, least(kChunk, state.ld() - c), sums + c * 3 * kProbes);
        }
    }

    static void probe_terms(const float* sums, int64_t stride, int64_t count, double* terms) {
        for (int64_t i = 0; i < 4 * kProbes; ++i) terms[i] = 0;
        for (int64_t c = 0; c < kUnit; ++c, sums += 3 * kProbes) {
            float row[3 * kProbes] = {};
            for (int64_t part = 0; part < count; ++part)
                for (int64_t i = 0; i < 3 * kProbes; ++i) row[i] += sums[part * stride + i];
            for (int64_t p = 0; p < kProbes; ++p) {
                const double s = row[p], e = row[kProbes + p], f = row[2 * kProbes + p];
                terms[p] += e * e;
                terms[kProbes + p] += s * f;
                terms[2 * kProbes + p] += e * f;
                terms[3 * kProbes + p] += f * f;
            }
        }
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
