// The table of functions that each instruction set provides. This header is seen by files compiled
// for different instruction sets, so it holds declarations and plain data only: an inline function
// here could be emitted with AVX-512 code and then be picked by the linker for every machine.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/problem.h"

namespace domerge {

// Scratch memory of one thread. `take` hands out 64-byte aligned pieces until `reset`.
class Arena {
 public:
    Arena();
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    void reset();
    void* take(size_t bytes);

 private:
    struct State;
    State* state_;
};

// Throws where the call has to end early. To be called every few milliseconds; costs some
// nanoseconds.
void poll();

struct DescentOptions {
    bool frobenius;
    double gamma;
    int64_t steps;
    double tol;
};

struct DescentStats {
    double steps;
    double objective_before;
    double objective_after;
    double cross_left;
    double change;
};

// Columns [begin, end) of out = coefficients X; `coefficients` null means the identity.
struct ApplyItem {
    const Problem* problem;
    const float* coefficients;  // [rows, R]
    int64_t rows;
    int64_t begin;
    int64_t end;
    void* out;  // all of [rows, d], or [d, rows] for a problem in columns
    DType out_dtype;
};

// A square root S of a positive semidefinite matrix K: S^T S = K / norm^2, norm^2 = trace K.
struct Root {
    const float* data;  // [rows, stride], zero rows up to a whole tile
    int64_t rows;
    int64_t stride;
    float norm;
};

struct DecoupleItem {
    ApplyItem apply;
    const Root* roots;  // one an adapter
    const double* omegas;
    double scale;
    const Root* full;  // of H_ij / (norm_i norm_j) for all i, j; or null: no renormalization
    double* energies;  // [count]: sum of the squared magnitudes of these columns
};

// Rows [begin, end) of the updates s_i B_i A_i: `a` holds the A_i [r_i, n] in rows, `b` the B_i^T
// [r_i, m] and the s_i.
struct UpdateItem {
    const Problem* a;
    const Problem* b;
    int64_t begin;
    int64_t end;
};

// What domerge_fast/entries.py says of an adapter's entries, and of all of them.
struct Trim {
    float low;
    float high;
    float keep;
    float spread;
    float gain;
    bool rescale;
};

struct Draw {
    uint32_t key[2];
    uint32_t adapter;
    uint32_t module;
};

enum class Sign : int { none = 0, total = 1, frequency = 2 };
enum class Mean : int { sum = 0, count = 1, weight = 2 };

struct MergeRule {
    const Trim* trims;  // these three: one an adapter
    const Draw* draws;
    const float* weights;
    Sign sign;
    bool weighted;
    Mean mean;
    float scale;
};

struct FactorKernels;  // factor_kernels.h
struct LongKernels;    // long_product.h

struct Kernels {
    const char* name;
    // sum [R, R] += X X^T (or = when `first`) over columns [begin, end), lower triangle only.
    void (*gram)(const Problem&, int64_t begin, int64_t end, bool first, float* sum, Arena&);
    void (*gram_double)(const Problem&, int64_t begin, int64_t end, bool first, double* sum,
                        Arena&);
    void (*orthogonalize)(const float* gram, int64_t rank, const int64_t* ranks, int64_t count,
                          const DescentOptions&, float* coefficients, DescentStats*, Arena&);
    // Both return whether all that they wrote is finite.
    bool (*apply)(const ApplyItem&, Arena&);
    bool (*apply_decouple)(const DecoupleItem&, Arena&);
    int64_t (*root_rows)(int64_t rank);
    int64_t (*root_stride)(int64_t rank);
    Root (*root)(const double* matrix, int64_t rank, float* data, Arena&);
    // out [count, count]: the sums over every block of the products of x's and y's entries.
    void (*block_products)(const float* x, const float* y, int64_t rank, const int64_t* ranks,
                           int64_t count, double* out, Arena&);
    // Of all magnitudes, where Inf is above all numbers and NaN above Inf.
    double (*largest)(const void* data, int64_t count, DType);
    // counts [2, bins], of one adapter, += how often the upper bits of the magnitudes occur, or the
    // lower bits behind *prefix; the sum of both rows is what is asked for.
    void (*entry_counts)(const UpdateItem&, const uint32_t* prefix, uint32_t* counts, Arena&);
    // sums [end - begin, 2]: every row's magnitudes of one adapter, all and kept.
    void (*entry_sums)(const UpdateItem&, const Trim&, const Draw&, double* sums, Arena&);
    void (*entry_merge)(const UpdateItem&, const MergeRule&, float* out, Arena&);  // out: all rows
    const FactorKernels* single;     // with products of float32
    const FactorKernels* half;       // with products of bfloat16; null where they gain nothing
    const LongKernels* long_single;  // with products of float32
    const LongKernels* long_half;    // of numbers in two bfloat16 parts; null where slower
};

}  // namespace domerge
