// Products by block: problems over threads.
#include <numeric>

#include "dispatch.h"
#include "threads.h"

namespace domerge {

void block_products(const Kernels& kernels, const Addresses& x, const Addresses& y,
                    const std::vector<int64_t>& ranks, uint64_t out, int threads) {
    const int64_t count = static_cast<int64_t>(ranks.size());
    const int64_t rank = std::accumulate(ranks.begin(), ranks.end(), int64_t{0});
    parallel_for(x.size(), threads, [&](int64_t p, Arena& arena) {
        kernels.block_products(at<const float>(x[p]), at<const float>(y[p]), rank, ranks.data(),
                               count, at<double>(out) + p * count * count, arena);
    });
}

}  // namespace domerge
