// What a descent on the factors themselves asks of an instruction set (factor_descent.cpp), for two
// arithmetics: products of bfloat16 numbers, or of float32 ones; sums are float32 in both.
//
// A panel is 32 columns of Y [R, d], or 32 rows of it, in units of 32 x 32 numbers, one after the
// other along the sum of a product. A symmetric matrix [d, d] is kept as the squares of 32 x 32
// float32 numbers on and below its diagonal, row by row of squares.
#pragma once

#include "kernels.h"

namespace domerge {

constexpr int64_t kUnit = 32;
constexpr int64_t kUnitNumbers = kUnit * kUnit;
constexpr int64_t kProbes = 16;  // vectors of signs that a line's terms are estimated with

struct FactorRow {
    const void* x;  // [d]
    DType dtype;
    float scale;          // on reading
    float root;           // n_i^-1/2 of its adapter, 0 where that is left as it is
    float step;           // of the gradient, in a direction
    int64_t first, last;  // rows of its adapter
    const float* own;     // its row of K_i [r_i, r_i]
};

struct FactorState {
    int64_t rows, d;                    // R, d
    int64_t units, columns;             // of 32 rows, of 32 columns
    int64_t first_packed, packed;       // units of rows, of which Y's columns have panels
    int64_t block_rows, block_columns;  // of units, of what is multiplied at once
    float gamma;
    const FactorRow* row;        // [R]
    float* x_hat;                // [R, d]
    void *direction, *gradient;  // [R, 32 columns], zero beyond d
    void *left, *right;  // panels of Y's columns, or of S; both the same with float32 products

    int64_t ld() const { return columns * kUnit; }
    int64_t last_row(int64_t unit) const {
        return (unit + 1) * kUnit < rows ? (unit + 1) * kUnit : rows;
    }
};

struct FactorKernels {
    int64_t number_bytes;
    double noise;                       // of sums of products, relatively
    int64_t panels;                     // kinds of them: 1 where a left operand's are a right one's
    int64_t block_rows, block_columns;  // of units, of what is multiplied at once in large problems
    int64_t estimated;                  // the least d of which lines are estimated

    double (*squared_norm)(const FactorRow&, int64_t d);
    // Xhat = factors[r] X, of one unit of rows.
    void (*place)(const FactorState&, int64_t unit, const float* factors);
    // Panels of Y = root (of_position Xhat + of_direction D), of one unit of rows.
    void (*pack)(const FactorState&, int64_t unit, float of_position, float of_direction);
    // squares = (where the first unit of rows is packed) or += Y^T Y, what block (i, j) has of
    // them.
    void (*gram)(const FactorState&, int64_t i, int64_t j, float* squares);
    // Panel j of S.
    void (*pack_squares)(const FactorState&, const float* squares, int64_t j);
    // One strip of the gradient, `block_rows` units; sums: <g, M g>, <g, M g_old>, <g, D>.
    void (*gradient)(const FactorState&, int64_t strip, double* sums, Arena&);
    // D = -M g + beta D, of one unit of rows; sums: <D, Xhat - X>, <D, D>.
    void (*turn)(const FactorState&, int64_t unit, float beta, double* sums);
    // Xhat += eta D, of one unit of rows.
    void (*move)(const FactorState&, int64_t unit, float eta);
    // Of an adapter [r_i, r_i]: e = Y Z^T + Z Y^T and f = Z Z^T, with Z = root D; or k = Y Y^T
    // alone.
    void (*own)(const FactorState&, int64_t first, float* k, float* e, float* f, Arena&);
    // Adds to sums [32 columns, 3, kProbes], of one unit of rows, Y^T P, Y^T Q + Z^T P and Z^T Q,
    // where P = Y V, Q = Z V. signs: V [32 columns and up to 64 more, kProbes].
    void (*probe)(const FactorState&, int64_t unit, const float* signs, float* sums, Arena&);
    // Of 32 columns of such sums, in `count` parts `stride` apart: terms [4, kProbes], of every
    // probe <E v, E v>, <S v, F v>, <E v, F v> and <F v, F v>.
    void (*probe_terms)(const float* sums, int64_t stride, int64_t count, double* terms);
    // <S' - S, S' + S> of row i of squares.
    double (*rise)(const float* s, const float* next, int64_t i);
    // Of row i of squares, where e is that of Y + trial Z: makes it E = Y^T Z + Z^T Y. sums:
    // <S, S>, <S, E>, <E, E>, <S, F>, <E, F>, <F, F>; <S, S> alone where e is null.
    void (*line)(const float* s, float* e, const float* f, float trial, int64_t i, double* sums);
    // S += eta E + eta^2 F, row i of squares.
    void (*advance)(float* s, const float* e, const float* f, int64_t i, float eta);
    // Xhat *= size, of one unit of rows; sums [R, 2], of each row: <Xhat, X> and <X, X> before.
    void (*finish)(const FactorState&, int64_t unit, float size, double* sums);
};

}  // namespace domerge
