// Applies: pieces of the problems' columns over threads.
#include <algorithm>
#include <cmath>

#include "chunks.h"
#include "dispatch.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kApplyChunk = 3072;

// Of every problem, whether what was written of all of its chunks is finite.
void gather_finite(const std::vector<Chunk>& chunks, const std::vector<char>& of_chunks,
                   int64_t problems, bool* finite) {
    std::fill_n(finite, problems, true);
    for (size_t c = 0; c < chunks.size(); ++c)
        finite[chunks[c].problem] = finite[chunks[c].problem] && of_chunks[c];
}

// Memory and descriptors of the square roots that apply_decouple needs.
struct Roots {
    std::vector<float> data;
    std::vector<int64_t> offset;
    std::vector<int64_t> ranks;
    std::vector<const double*> matrices;
    std::vector<Root> roots;

    void add(const Kernels& kernels, const double* matrix, int64_t rank) {
        offset.push_back(total);
        ranks.push_back(rank);
        matrices.push_back(matrix);
        total += kernels.root_rows(rank) * kernels.root_stride(rank);
    }

    void find(const Kernels& kernels, int threads) {
        data.resize(total);
        roots.resize(ranks.size());
        parallel_for(ranks.size(), threads, [&](int64_t i, Arena& arena) {
            roots[i] = kernels.root(matrices[i], ranks[i], data.data() + offset[i], arena);
        });
    }

 private:
    int64_t total = 0;
};

// H_ij / (norm_i norm_j), 0 for zero factors: every adapter of the same size.
std::vector<double> balance(const double* matrix, const Problem& problem, const Root* roots) {
    std::vector<double> inverse, result(problem.rank * problem.rank);
    for (int64_t b = 0; b < problem.count; ++b)
        inverse.insert(inverse.end(), problem.blocks[b].rank,
                       roots[b].norm > 0 ? 1.0 / roots[b].norm : 0.0);
    for (int64_t i = 0; i < problem.rank; ++i)
        for (int64_t j = 0; j < problem.rank; ++j)
            result[i * problem.rank + j] = matrix[i * problem.rank + j] * (inverse[i] * inverse[j]);
    return result;
}

}  // namespace

void apply(const Kernels& kernels, const Problems& problems, const Addresses& coefficients,
           const std::vector<int64_t>& rows, const Addresses& out, int out_dtype, uint64_t finite,
           int threads) {
    const std::vector<Chunk> chunks = chunks_of(problems.list(), kApplyChunk);
    std::vector<char> seen(chunks.size());
    parallel_for(chunks.size(), threads, [&](int64_t item, Arena& arena) {
        const Chunk& c = chunks[item];
        const ApplyItem work{&problems[c.problem],
                             at<const float>(coefficients[c.problem]),
                             rows[c.problem],
                             c.begin,
                             c.end,
                             at<void>(out[c.problem]),
                             static_cast<DType>(out_dtype)};
        seen[item] = kernels.apply(work, arena);
    });
    gather_finite(chunks, seen, problems.size(), at<bool>(finite));
}

void apply_decouple(const Kernels& kernels, const Problems& problems, const Addresses& coefficients,
                    const Addresses& blocks, const std::vector<double>& omegas, double scale,
                    const Addresses& full, const Addresses& out, int out_dtype,
                    const Addresses& norms, uint64_t finite, int threads) {
    Roots roots, full_roots;
    std::vector<int64_t> first_block;
    for (int64_t p = 0; p < problems.size(); ++p) {
        first_block.push_back(static_cast<int64_t>(roots.ranks.size()));
        const double* matrix = at<const double>(blocks[p]);
        for (int64_t b = 0; b < problems[p].count; ++b) {
            const int64_t rank = problems[p].blocks[b].rank;
            roots.add(kernels, matrix, rank);
            matrix += rank * rank;
        }
    }
    roots.find(kernels, threads);
    std::vector<std::vector<double>> balanced(full.size());
    for (size_t p = 0; p < full.size(); ++p) {
        balanced[p] = balance(at<const double>(full[p]), problems[p], &roots.roots[first_block[p]]);
        full_roots.add(kernels, balanced[p].data(), problems[p].rank);
    }
    full_roots.find(kernels, threads);

    const std::vector<Chunk> chunks = chunks_of(problems.list(), kApplyChunk);
    std::vector<std::vector<double>> energies(chunks.size());
    std::vector<char> seen(chunks.size());
    parallel_for(chunks.size(), threads, [&](int64_t item, Arena& arena) {
        const Chunk& c = chunks[item];
        const Problem& problem = problems[c.problem];
        energies[item].resize(problem.count);
        const ApplyItem work{&problem,
                             at<const float>(coefficients[c.problem]),
                             problem.rank,
                             c.begin,
                             c.end,
                             at<void>(out[c.problem]),
                             static_cast<DType>(out_dtype)};
        const DecoupleItem whole{work,
                                 &roots.roots[first_block[c.problem]],
                                 &omegas[first_block[c.problem]],
                                 scale,
                                 full.empty() ? nullptr : &full_roots.roots[c.problem],
                                 energies[item].data()};
        seen[item] = kernels.apply_decouple(whole, arena);
    });
    gather_finite(chunks, seen, problems.size(), at<bool>(finite));
    for (size_t c = 0; c < chunks.size(); ++c) {
        double* sum = at<double>(norms[chunks[c].problem]);
        for (size_t b = 0; b < energies[c].size(); ++b)
            sum[b] = chunks[c].begin == 0 ? energies[c][b] : sum[b] + energies[c][b];
    }
    for (int64_t p = 0; p < problems.size(); ++p)
        for (int64_t b = 0; b < problems[p].count; ++b)
            at<double>(norms[p])[b] = std::sqrt(at<double>(norms[p])[b]);
}

}  // namespace domerge
