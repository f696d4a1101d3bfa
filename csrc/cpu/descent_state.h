// What a descent on R x R matrices has in memory: the factors' rows, and the matrices.
#pragma once

#include "../common/descent.h"
#include "kernels.h"
#include "tile.h"

namespace domerge {
namespace DOMERGE_ISA {

struct Segments {
    int64_t count;
    int64_t* start;       // [count + 1]
    int64_t* of_row;      // [R]
    double* factor_norm;  // [count]: n_i, 0 if negligible
};

struct Matrices {
    int64_t rank, rows, columns, ld;
    float *gram, *h, *ct, *pt, *pt_old, *dt, *qt, *qpt, *e, *f;
    float* m;                 // shares memory with e: M is used up before E is made
    float* diagonal;          // of Ct - I, exactly; ct itself holds Ct or Ct - I: see set_diagonal
    float *curvature, *step;  // [ld]: K of every row and its inverse, 0 of one that stays
    double* sums;             // [5, ld]
    float* weight;  // [count, ld]: row j is V_ij over the columns of every earlier segment i
};

inline Segments make_segments(const int64_t* ranks, int64_t count, int64_t rank, Arena& arena) {
    Segments s{count, static_cast<int64_t*>(arena.take((count + 1) * sizeof(int64_t))),
               static_cast<int64_t*>(arena.take(rank * sizeof(int64_t))),
               static_cast<double*>(arena.take(count * sizeof(double)))};
    s.start[0] = 0;
    for (int64_t j = 0; j < count; ++j) {
        s.start[j + 1] = s.start[j] + ranks[j];
        for (int64_t i = s.start[j]; i < s.start[j + 1]; ++i) s.of_row[i] = j;
    }
    return s;
}

inline Matrices make_matrices(int64_t rank, int64_t count, Arena& arena) {
    Matrices m{};
    m.rank = rank;
    m.rows = pad_rows(rank);
    m.columns = round_up(rank, kWidth);
    m.ld = row_stride<float>(rank);
    const int64_t rows = round_up(rank, 16);
    float** all[] = {&m.gram, &m.h, &m.ct, &m.pt, &m.pt_old, &m.dt, &m.qt, &m.qpt, &m.e, &m.f};
    for (float** matrix : all) {
        *matrix = static_cast<float*>(arena.take(rows * m.ld * sizeof(float)));
        for (int64_t i = 0; i < rows; ++i) {
            float* row = *matrix + i * m.ld;
            for (int64_t j = i < rank ? rank : 0; j < m.columns; ++j) row[j] = 0.0f;
        }
    }
    m.m = m.e;
    m.diagonal = static_cast<float*>(arena.take(rank * sizeof(float)));
    for (float** row : {&m.curvature, &m.step}) {
        *row = static_cast<float*>(arena.take(m.ld * sizeof(float)));
        for (int64_t j = 0; j < m.ld; ++j) (*row)[j] = 0.0f;
    }
    m.sums = static_cast<double*>(arena.take(5 * m.ld * sizeof(double)));
    m.weight = static_cast<float*>(arena.take(count * m.ld * sizeof(float)));
    for (int64_t i = 0; i < count * m.ld; ++i) m.weight[i] = 0.0f;
    return m;
}

// C = I, H = G / scale, the factors' norms.
inline void begin_descent(const float* gram, double scale, const Matrices& m, const Segments& s) {
    const double unit = 1.0 / scale;
    for (int64_t i = 0; i < m.rank; ++i) {
        m.diagonal[i] = 0.0f;
        for (int64_t j = 0; j < m.rank; ++j) {
            m.ct[i * m.ld + j] = 0.0f;
            m.gram[i * m.ld + j] = m.h[i * m.ld + j] =
                static_cast<float>(gram[i * m.rank + j] * unit);
        }
    }
    for (int64_t j = 0; j < s.count; ++j) {
        double trace = 0;
        for (int64_t i = s.start[j]; i < s.start[j + 1]; ++i) trace += m.gram[i * m.ld + i];
        s.factor_norm[j] = trace > 0 ? __builtin_sqrt(trace) : 0.0;
    }
    double largest = 0;
    for (int64_t j = 0; j < s.count; ++j)
        if (s.factor_norm[j] > largest) largest = s.factor_norm[j];
    for (int64_t j = 0; j < s.count; ++j)
        if (s.factor_norm[j] <= kNegligible * largest) s.factor_norm[j] = 0.0;
}

// Columns of row i that lie in an earlier segment than row i's.
DOMERGE_INLINE int64_t earlier(const Segments& s, int64_t rank, int64_t i) {
    return s.start[s.of_row[i < rank ? i : rank - 1]];
}

// Makes ct hold Ct (identity 1) or Ct - I (identity 0), by which the change is measured.
inline void set_diagonal(const Matrices& m, float identity) {
    for (int64_t i = 0; i < m.rank; ++i) m.ct[i * m.ld + i] = identity + m.diagonal[i];
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
