#include "dispatch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "factor_descent.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kGramChunk = 4096;
constexpr int64_t kBundle = 16;   // ranks that one tile of double sums holds
constexpr int64_t kCached = 512;  // columns of all blocks that block_gram keeps in L2
constexpr int64_t kApplyChunk = 3072;
constexpr double kShared = 1e9;  // R d^2 of a descent on factors that takes all threads
constexpr int64_t kLargestChunk = int64_t{1} << 20;

// Positions by falling cost.
std::vector<int64_t> largest_first(const std::vector<double>& cost) {
    std::vector<int64_t> order(cost.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    return order;
}

struct Chunk {
    int64_t problem;
    int64_t begin;
    int64_t end;
};

// Pieces of fixed width of every problem's columns; those of a problem are next to each other.
std::vector<Chunk> chunks_of(const std::vector<Problem>& problems, int64_t width) {
    std::vector<Chunk> chunks;
    for (size_t p = 0; p < problems.size(); ++p)
        for (int64_t begin = 0; begin < problems[p].d; begin += width)
            chunks.push_back(
                Chunk{static_cast<int64_t>(p), begin, std::min(begin + width, problems[p].d)});
    return chunks;
}

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

// One of what lies in these bytes, one after the other.
template <class T>
T nth(std::string_view bytes, size_t k) {
    T found;
    std::memcpy(&found, bytes.data() + k * sizeof(T), sizeof(T));
    return found;
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

int64_t bytes_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Of every problem, whether what was written of all of its chunks is finite.
void gather_finite(const std::vector<Chunk>& chunks, const std::vector<char>& of_chunks,
                   int64_t problems, bool* finite) {
    std::fill_n(finite, problems, true);
    for (size_t c = 0; c < chunks.size(); ++c)
        finite[chunks[c].problem] = finite[chunks[c].problem] && of_chunks[c];
}

// Raises `top` to a magnitude, where NaN is above all.
void raise(double& top, double value) {
    if (!std::isnan(top) && !(value <= top)) top = value;
}

double largest_of_block(const Kernels& kernels, const Problem& problem, const Block& block) {
    const int64_t width = problem.columns ? block.rank : problem.d;
    const int64_t rows = problem.columns ? problem.d : block.rank;
    if (block.pitch == width) return kernels.largest(block.data, rows * width, block.dtype);
    const char* row = static_cast<const char*>(block.data);
    double top = 0.0;
    for (int64_t i = 0; i < rows; ++i, row += block.pitch * bytes_of(block.dtype))
        raise(top, kernels.largest(row, width, block.dtype));
    return top;
}

}  // namespace

Problems::Problems(std::string_view addresses, std::string_view heads, std::string_view rows) {
    const size_t count = addresses.size() / sizeof(uint64_t);
    if (count != rows.size() / sizeof(Row))
        throw std::invalid_argument("one address a row is wanted");
    blocks_.reserve(count);
    for (size_t b = 0; b < count; ++b) {
        const auto row = nth<Row>(rows, b);
        blocks_.push_back(Block{at<const void>(nth<uint64_t>(addresses, b)), row.rank, row.pitch,
                                row.scale, static_cast<DType>(row.dtype)});
    }
    problems_.reserve(heads.size() / sizeof(Head));
    size_t first = 0;
    for (size_t p = 0; p < heads.size() / sizeof(Head); ++p) {
        const auto head = nth<Head>(heads, p);
        if (first + head.count > blocks_.size()) throw std::invalid_argument("too few rows");
        problems_.push_back(
            Problem{&blocks_[first], head.count, head.rank, head.d, head.columns != 0});
        first += head.count;
    }
}

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

void orthogonalize(const Kernels& kernels, const Addresses& grams,
                   const std::vector<int64_t>& ranks, const std::vector<int64_t>& counts,
                   const Addresses& out, uint64_t stats, bool frobenius, double gamma,
                   int64_t steps, double tol, int threads) {
    std::vector<int64_t> first(counts.size()), sizes(counts.size());
    std::vector<double> cost(counts.size());
    for (size_t p = 0, next = 0; p < counts.size(); next += counts[p++]) {
        first[p] = next;
        sizes[p] = std::accumulate(&ranks[next], &ranks[next] + counts[p], int64_t{0});
        cost[p] = double(sizes[p]) * sizes[p] * sizes[p];
    }
    const std::vector<int64_t> order = largest_first(cost);
    const DescentOptions options{frobenius, gamma, steps, tol};
    parallel_for(counts.size(), threads, [&](int64_t item, Arena& arena) {
        const int64_t p = order[item];
        kernels.orthogonalize(at<const float>(grams[p]), sizes[p], &ranks[first[p]], counts[p],
                              options, at<float>(out[p]), at<DescentStats>(stats) + p, arena);
    });
}

// Large problems one after the other, each on all threads; the rest each on a thread. What an item
// of a descent sums does not depend on that.
void orthogonalize_factors(const Kernels& kernels, const Problems& problems, const Addresses& out,
                           uint64_t stats, bool half, double gamma, int64_t steps, double tol,
                           int threads) {
    const FactorKernels& chosen = half && kernels.half ? *kernels.half : *kernels.single;
    const DescentOptions options{false, gamma, steps, tol};
    std::vector<double> cost;
    for (const Problem& p : problems.list()) cost.push_back(double(p.rank) * p.d * p.d);
    std::vector<int64_t> small;
    const auto descend = [&](int64_t p, const Run& run, Arena& memory) {
        at<FactorStats>(stats)[p] =
            descend_on_factors(chosen, problems[p], options, at<float>(out[p]), run, memory);
    };
    Arena shared;
    for (int64_t p : largest_first(cost)) {
        if (cost[p] < kShared)
            small.push_back(p);
        else
            descend(
                p, [&](int64_t count, const Body& body) { parallel_for(count, threads, body); },
                shared);
    }
    parallel_for(small.size(), threads, [&](int64_t item, Arena& memory) {
        Arena scratch;
        const Run alone = [&](int64_t count, const Body& body) {
            for (int64_t i = 0; i < count; ++i) {
                poll();
                scratch.reset();
                body(i, scratch);
            }
        };
        descend(small[item], alone, memory);
    });
}

bool half_products(const Kernels& kernels) {
    return kernels.half != nullptr;
}

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

void block_products(const Kernels& kernels, const Addresses& x, const Addresses& y,
                    const std::vector<int64_t>& ranks, uint64_t out, int threads) {
    const int64_t count = static_cast<int64_t>(ranks.size());
    const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    parallel_for(x.size(), threads, [&](int64_t p, Arena& arena) {
        kernels.block_products(at<const float>(x[p]), at<const float>(y[p]), rank, ranks.data(),
                               count, at<double>(out) + p * count * count, arena);
    });
}

void largest(const Kernels& kernels, const Addresses& data, const std::vector<int64_t>& counts,
             const std::vector<int>& dtypes, uint64_t out, int threads) {
    std::vector<Chunk> chunks;
    for (size_t t = 0; t < data.size(); ++t)
        for (int64_t begin = 0; begin < counts[t]; begin += kLargestChunk)
            chunks.push_back(
                Chunk{static_cast<int64_t>(t), begin, std::min(begin + kLargestChunk, counts[t])});
    std::vector<double> found(chunks.size());
    parallel_for(chunks.size(), threads, [&](int64_t item, Arena&) {
        const Chunk& c = chunks[item];
        const DType dtype = static_cast<DType>(dtypes[c.problem]);
        found[item] = kernels.largest(at<const char>(data[c.problem]) + c.begin * bytes_of(dtype),
                                      c.end - c.begin, dtype);
    });
    double* result = at<double>(out);
    std::fill_n(result, data.size(), 0.0);
    for (size_t c = 0; c < chunks.size(); ++c) raise(result[chunks[c].problem], found[c]);
}

void block_largest(const Kernels& kernels, const Problems& problems, uint64_t out, int threads) {
    std::vector<int64_t> first;
    int64_t total = 0;
    for (const Problem& problem : problems.list()) {
        first.push_back(total);
        total += problem.count;
    }
    parallel_for(problems.size(), threads, [&](int64_t p, Arena&) {
        const Problem& problem = problems[p];
        double* result = at<double>(out) + first[p];
        for (int64_t b = 0; b < problem.count; ++b) {
            poll();
            result[b] = largest_of_block(kernels, problem, problem.blocks[b]);
        }
    });
}

}  // namespace domerge
