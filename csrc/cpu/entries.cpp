// Entrywise ops: rows of updates over threads.
#include <algorithm>
#include <limits>
#include <mutex>

#include "dispatch.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kBinRows = 512;     // so that sums over threads cost nothing beside counting
constexpr int64_t kMergeRows = 128;   // at most: so that A is converted once for many rows
constexpr int64_t kItemsAThread = 4;  // at least, where there are rows enough
constexpr int64_t kStrip = 8;
constexpr int64_t kUpperBins = 1 << 16, kLowerBins = 1 << 15;

struct Rules {
    std::vector<Trim> trims;
    std::vector<Draw> draws;

    Rules(const std::vector<double>& numbers, const std::vector<bool>& rescales, int64_t seed,
          int64_t module, const std::vector<int64_t>& adapters) {
        const auto word = [](int64_t x) { return static_cast<uint32_t>(x); };
        for (size_t i = 0; i < adapters.size(); ++i) {
            float t[5];
            std::copy_n(numbers.begin() + 5 * i, 5, t);
            trims.push_back(Trim{t[0], t[1], t[2], t[3], t[4], rescales[i]});
            draws.push_back(Draw{{word(seed), word(seed >> 32)}, word(adapters[i]), word(module)});
        }
    }
};

// body(adapter, item, arena) for blocks of `height` rows of the updates of single adapters.
template <class Body>
void for_adapters(const Problem& a, const Problem& b, int64_t height, int threads,
                  const Body& body) {
    const int64_t blocks = (b.d + height - 1) / height;
    parallel_for(a.count * blocks, threads, [&](int64_t i, Arena& arena) {
        const int64_t adapter = i / blocks, begin = i % blocks * height;
        const int64_t rank = a.blocks[adapter].rank;
        const Problem one_a{&a.blocks[adapter], 1, rank, a.d, a.columns};
        const Problem one_b{&b.blocks[adapter], 1, rank, b.d, b.columns};
        body(adapter, UpdateItem{&one_a, &one_b, begin, std::min(begin + height, b.d)}, arena);
    });
}

}  // namespace

void entry_counts(const Kernels& kernels, const Problems& a, const Problems& b,
                  const std::vector<int64_t>& prefixes, uint64_t out, int threads) {
    const int64_t bins = prefixes.empty() ? kUpperBins : kLowerBins;
    std::vector<std::mutex> locks(a[0].count);
    // No 32-bit count of an item overflows: each is of every other column.
    const int64_t most = std::numeric_limits<uint32_t>::max() / (a[0].d / 2 + 1);
    const int64_t height = std::clamp<int64_t>(most, 1, kBinRows);
    for_adapters(a[0], b[0], height, threads, [&](int64_t i, UpdateItem item, Arena& arena) {
        auto* counts = static_cast<uint32_t*>(arena.take(2 * bins * sizeof(uint32_t)));
        std::fill_n(counts, 2 * bins, 0);
        const uint32_t prefix = prefixes.empty() ? 0 : static_cast<uint32_t>(prefixes[i]);
        kernels.entry_counts(item, prefixes.empty() ? nullptr : &prefix, counts, arena);
        const std::lock_guard<std::mutex> guard(locks[i]);
        int64_t* sum = at<int64_t>(out) + i * bins;
        for (int64_t bin = 0; bin < bins; ++bin)
            sum[bin] += int64_t{counts[bin]} + counts[bins + bin];
    });
}

void entry_sums(const Kernels& kernels, const Problems& a, const Problems& b,
                const std::vector<double>& trims, const std::vector<bool>& rescales, int64_t seed,
                int64_t module, const std::vector<int64_t>& adapters, uint64_t out, int threads) {
    const Rules rules(trims, rescales, seed, module, adapters);
    const int64_t m = b[0].d, count = a[0].count;
    std::vector<double> rows(count * m * 2);
    for_adapters(a[0], b[0], kBinRows, threads, [&](int64_t i, UpdateItem item, Arena& arena) {
        double* sums = rows.data() + (i * m + item.begin) * 2;
        kernels.entry_sums(item, rules.trims[i], rules.draws[i], sums, arena);
    });
    for (int64_t i = 0; i < count; ++i)
        for (int64_t row = i * m; row < (i + 1) * m; ++row)
            for (int64_t k = 0; k < 2; ++k) at<double>(out)[2 * i + k] += rows[2 * row + k];
}

void entry_merge(const Kernels& kernels, const Problems& a, const Problems& b,
                 const std::vector<double>& trims, const std::vector<bool>& rescales, int64_t seed,
                 int64_t module, const std::vector<int64_t>& adapters,
                 const std::vector<double>& weights, int sign, bool weighted, int mean,
                 double scale, uint64_t out, int threads) {
    const Rules rules(trims, rescales, seed, module, adapters);
    const std::vector<float> w(weights.begin(), weights.end());
    const MergeRule rule{rules.trims.data(),       rules.draws.data(), w.data(),
                         static_cast<Sign>(sign),  weighted,           static_cast<Mean>(mean),
                         static_cast<float>(scale)};
    const int64_t m = b[0].d, share = m / (kItemsAThread * threads * kStrip) * kStrip;
    const int64_t height = std::clamp(share, kStrip, kMergeRows);
    parallel_for((m + height - 1) / height, threads, [&](int64_t i, Arena& arena) {
        const int64_t begin = i * height;
        const UpdateItem item{&a[0], &b[0], begin, std::min(begin + height, m)};
        kernels.entry_merge(item, rule, at<float>(out), arena);
    });
}

}  // namespace domerge
