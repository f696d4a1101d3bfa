// Descents: problems over threads; large ones on factors take all of them.
#include <numeric>

#include "chunks.h"
#include "dispatch.h"
#include "factor_descent.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr double kShared = 1e9;  // R d^2 of a descent on factors that takes all threads

}  // namespace

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

}  // namespace domerge
