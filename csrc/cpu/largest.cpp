// Largest magnitudes: stretches of memory, or problems, over threads.
#include <algorithm>
#include <cmath>

#include "chunks.h"
#include "dispatch.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kLargestChunk = int64_t{1} << 20;

int64_t bytes_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
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
