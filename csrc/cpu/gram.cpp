// Grams: problems, or pieces of their columns, over threads.
#include <algorithm>

#include "chunks.h"
#include "dispatch.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kGramChunk = 4096;
constexpr int64_t kBundle = 16;   // ranks that one tile of double sums holds
constexpr int64_t kCached = 512;  // columns of all blocks that block_gram keeps in L2

template <class T>
void call_gram(const Kernels& kernels, const Problem& problem, int64_t begin, int64_t end,
               bool first, T* sum, Arena& arena) {
    if constexpr (sizeof(T) == 8)
        kernels.gram_double(problem, begin, end, first, sum, arena);
    else
        kernels.gram(problem, begin, end, first, sum, arena);
}

template <class T>
void mirror(T* matrix, int64_t rank) {
    for (int64_t i = 0; i < rank; ++i)
        for (int64_t j = 0; j < i; ++j) matrix[j * rank + i] = matrix[i * rank + j];
}

template <class T>
void gram_by_problem(const Kernels& kernels, const std::vector<Problem>& problems,
                     const std::vector<T*>& out, int threads) {
    std::vector<double> cost;
    for (const Problem& p : problems) cost.push_back(double(p.rank) * p.rank * p.d);
    const std::vector<int64_t> order = largest_first(cost);
    parallel_for(problems.size(), threads, [&](int64_t item, Arena& arena) {
        const Problem& problem = problems[order[item]];
        T* sum = out[order[item]];
        for (int64_t begin = 0; begin < problem.d; begin += kGramChunk) {
            arena.reset();
            call_gram(kernels, problem, begin, std::min(begin + kGramChunk, problem.d), begin == 0,
                      sum, arena);
        }
        mirror(sum, problem.rank);
    });
}

// The same sums in the same order as gram_by_problem, for few problems on many threads.
template <class T>
void gram_by_chunk(const Kernels& kernels, const std::vector<Problem>& problems,
                   const std::vector<T*>& out, int threads) {
    const std::vector<Chunk> chunks = chunks_of(problems, kGramChunk);
    std::vector<std::vector<T>> parts(chunks.size());
    parallel_for(chunks.size(), threads, [&](int64_t item, Arena& arena) {
        const Chunk& chunk = chunks[item];
        const Problem& problem = problems[chunk.problem];
        parts[item].resize(problem.rank * problem.rank);
        call_gram(kernels, problem, chunk.begin, chunk.end, true, parts[item].data(), arena);
    });
    for (size_t c = 0; c < chunks.size(); ++c) {
        T* sum = out[chunks[c].problem];
        for (size_t i = 0; i < parts[c].size(); ++i)
            sum[i] = chunks[c].begin == 0 ? parts[c][i] : parts[c][i] + sum[i];
    }
    for (size_t p = 0; p < problems.size(); ++p) mirror(out[p], problems[p].rank);
}

template <class T>
void gram_all(const Kernels& kernels, const std::vector<Problem>& problems,
              const std::vector<T*>& out, int threads) {
    if (static_cast<int64_t>(problems.size()) >= 4 * threads || threads == 1)
        gram_by_problem(kernels, problems, out, threads);
    else
        gram_by_chunk(kernels, problems, out, threads);
}

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> list;
    for (uint64_t address : addresses) list.push_back(at<T>(address));
    return list;
}

// The same blocks in smaller problems: neighbours whose ranks add up to `most`, or single ones.
std::vector<Problem> bundles_of(const Problem& problem, int64_t most) {
    std::vector<Problem> found;
    for (int64_t b = 0; b < problem.count; ++b) {
        const Block& block = problem.blocks[b];
        if (b == 0 || found.back().rank + block.rank > most)
            found.push_back(Problem{&block, 0, 0, problem.d, problem.columns});
        found.back().count += 1;
        found.back().rank += block.rank;
    }
    return found;
}

// Packs the blocks on the diagonal of a Gram one after the other; returns the end.
double* copy_diagonal_blocks(const Problem& problem, const double* gram, double* out) {
    int64_t first = 0;
    for (int64_t b = 0; b < problem.count; ++b) {
        const int64_t rank = problem.blocks[b].rank;
        for (int64_t i = first; i < first + rank; ++i)
            out = std::copy_n(gram + i * problem.rank + first, rank, out);
        first += rank;
    }
    return out;
}

}  // namespace

void gram(const Kernels& kernels, const Problems& problems, const Addresses& out, bool wide,
          int threads) {
    if (wide)
        gram_all(kernels, problems.list(), pointers<double>(out), threads);
    else
        gram_all(kernels, problems.list(), pointers<float>(out), threads);
}

// Neighbours in memory belong to different bundles: all of them take their part of some columns
// while these are in cache.
void block_gram(const Kernels& kernels, const Problems& problems, const Addresses& out,
                int threads) {
    std::vector<std::vector<Problem>> bundles;
    std::vector<int64_t> sizes;
    for (const Problem& problem : problems.list()) {
        bundles.push_back(bundles_of(problem, kBundle));
        sizes.push_back(0);
        for (const Problem& bundle : bundles.back()) sizes.back() += bundle.rank * bundle.rank;
    }
    const std::vector<Chunk> chunks = chunks_of(problems.list(), kGramChunk);
    std::vector<std::vector<double>> parts(chunks.size());
    parallel_for(chunks.size(), threads, [&](int64_t item, Arena& arena) {
        const Chunk& chunk = chunks[item];
        parts[item].resize(sizes[chunk.problem]);
        for (int64_t begin = chunk.begin; begin < chunk.end; begin += kCached) {
            double* sum = parts[item].data();
            for (const Problem& bundle : bundles[chunk.problem]) {
                arena.reset();
                kernels.gram_double(bundle, begin, std::min(begin + kCached, chunk.end),
                                    begin == chunk.begin, sum, arena);
                sum += bundle.rank * bundle.rank;
            }
        }
    });
    for (size_t c = 0; c < chunks.size();) {
        const int64_t p = chunks[c].problem;
        std::vector<double>& sum = parts[c];
        for (++c; c < chunks.size() && chunks[c].problem == p; ++c)
            for (size_t i = 0; i < sum.size(); ++i) sum[i] += parts[c][i];
        double* gram = sum.data();
        double* place = at<double>(out[p]);
        for (const Problem& bundle : bundles[p]) {
            mirror(gram, bundle.rank);
            place = copy_diagonal_blocks(bundle, gram, place);
            gram += bundle.rank * bundle.rank;
        }
    }
}

}  // namespace domerge
