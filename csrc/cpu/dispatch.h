// Lists of problems in, work items over threads, kernels of the best instruction set.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"

namespace domerge {

// Owns the descriptors; the data stays with the caller. Addresses are integers, as Python has them.
class Problems {
 public:
    // Bytes as packed.h has them: the addresses of all blocks, a `Head` for every problem, a `Row`
    // for every block.
    Problems(std::string_view addresses, std::string_view heads, std::string_view rows);
    const Problem& operator[](int64_t i) const { return problems_[i]; }
    int64_t size() const { return static_cast<int64_t>(problems_.size()); }
    const std::vector<Problem>& list() const { return problems_; }

 private:
    std::vector<Block> blocks_;
    std::vector<Problem> problems_;
};

// The best instruction set of this machine, or the one named by DOMERGE_CPU_ISA.
const Kernels& choose_kernels();
std::vector<std::string> supported_isas();

using Addresses = std::vector<uint64_t>;

template <class T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(address));
}

void gram(const Kernels&, const Problems&, const Addresses& out, bool wide, int threads);
void block_gram(const Kernels&, const Problems&, const Addresses& out, int threads);
void orthogonalize(const Kernels&, const Addresses& grams, const std::vector<int64_t>& ranks,
                   const std::vector<int64_t>& counts, const Addresses& out, uint64_t stats,
                   bool frobenius, double gamma, int64_t steps, double tol, int threads);
// Blocks in rows; out: float32 [R, d] a problem; stats: float64 [P, 7], see FactorStats. half: with
// products of bfloat16, where the kernels have them.
void orthogonalize_factors(const Kernels&, const Problems&, const Addresses& out, uint64_t stats,
                           bool half, double gamma, int64_t steps, double tol, int threads);
bool half_products(const Kernels&);
// out [rows, columns] = left^T right of float32 matrices [depth, rows] and [depth, columns]. half:
// with products of bfloat16, in which a number has 16 bits, where the kernels have them.
void long_product(const Kernels&, uint64_t left, uint64_t right, int64_t depth, int64_t rows,
                  int64_t columns, uint64_t out, bool half, int threads);
bool half_long_products(const Kernels&);
// finite: a bool a problem, whether all of its result is.
void apply(const Kernels&, const Problems&, const Addresses& coefficients,
           const std::vector<int64_t>& rows, const Addresses& out, int out_dtype, uint64_t finite,
           int threads);
void apply_decouple(const Kernels&, const Problems&, const Addresses& coefficients,
                    const Addresses& blocks, const std::vector<double>& omegas, double scale,
                    const Addresses& full, const Addresses& out, int out_dtype,
                    const Addresses& norms, uint64_t finite, int threads);
// All problems have these ranks; out [problems, T, T].
void block_products(const Kernels&, const Addresses& x, const Addresses& y,
                    const std::vector<int64_t>& ranks, uint64_t out, int threads);
// out: float64, one a stretch of `counts` elements.
void largest(const Kernels&, const Addresses& data, const std::vector<int64_t>& counts,
             const std::vector<int>& dtypes, uint64_t out, int threads);
// out: float64, one a block, whose scale is left out.
void block_largest(const Kernels&, const Problems&, uint64_t out, int threads);

// Entrywise ops on one module's updates: `a` and `b` hold one problem. out: int64 [T, bins].
void entry_counts(const Kernels&, const Problems& a, const Problems& b,
                  const std::vector<int64_t>& prefixes, uint64_t out, int threads);
// trims: low, high, keep, spread and gain of every adapter. out: float64 [T, 2].
void entry_sums(const Kernels&, const Problems& a, const Problems& b,
                const std::vector<double>& trims, const std::vector<bool>& rescales, int64_t seed,
                int64_t module, const std::vector<int64_t>& adapters, uint64_t out, int threads);
// out: float32 [m, n].
void entry_merge(const Kernels&, const Problems& a, const Problems& b,
                 const std::vector<double>& trims, const std::vector<bool>& rescales, int64_t seed,
                 int64_t module, const std::vector<int64_t>& adapters,
                 const std::vector<double>& weights, int sign, bool weighted, int mean,
                 double scale, uint64_t out, int threads);

}  // namespace domerge
