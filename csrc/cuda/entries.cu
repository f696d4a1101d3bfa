#include "trim.h"
#include "update.h"

namespace domerge {

namespace {

constexpr int kHighBits = 16, kLowBits = 15;  // as entries.py has them

int64_t tiles(int64_t length, int64_t size) {
    return (length + size - 1) / size;
}

struct CountParams {
    Updates updates;
    const int64_t* prefixes;  // or null
    uint64_t* counts;
};

// A stretch of a row of tiles of one update. The usual sizes, 2^-28 to 2^4, are counted in shared
// memory first; others, and those behind a prefix, are few.
template <class Format>
struct EntryCounts {
    using Params = CountParams;
    using Tau = Update<Format>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 2;
    static constexpr int64_t kStretch = 16 * Tau::kSize;
    static constexpr uint32_t kFirst = (127 - 28) << 8, kUsual = 32 << 8;
    static constexpr int64_t kSharedBytes = Tau::kSharedBytes + kUsual * sizeof(uint32_t);
    static_assert(kSharedBytes <= kSmallestShared);

    static int64_t blocks(int64_t adapters, int64_t m, int64_t n) {
        return adapters * tiles(m, Tau::kSize) * tiles(n, kStretch);
    }

    static DOMERGE_DEVICE void count(uint32_t bits, uint32_t* usual, uint64_t* counts) {
        const uint32_t bin = bits >> kLowBits;
        if (bin - kFirst < kUsual)
            add_atomically(usual + (bin - kFirst), 1u);
        else
            add_atomically(counts + bin, uint64_t{1});
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const Updates& updates = params.updates;
        const int64_t m = updates.m(), n = updates.n();
        const int64_t stretches = (n + kStretch - 1) / kStretch;
        const int64_t i = block.index / stretches % updates.adapters;
        const int64_t row = block.index / stretches / updates.adapters * Tau::kSize;
        const int64_t begin = block.index % stretches * kStretch;
        const int64_t end = least(begin + kStretch, n);
        float* const staged = reinterpret_cast<float*>(block.shared);
        uint32_t* const usual = reinterpret_cast<uint32_t*>(block.shared + Tau::kSharedBytes);
        const bool behind = params.prefixes != nullptr;
        const uint32_t prefix = behind ? static_cast<uint32_t>(params.prefixes[i]) : 0;
        uint64_t* const counts = params.counts + (i << (behind ? kLowBits : kHighBits));
        typename Tau::Entries entries;
        block.each([&](int thread) {
            for (uint32_t bin = thread; bin < kUsual; bin += kThreads) usual[bin] = 0;
        });
        for (int64_t column = begin; column < end; column += Tau::kSize) {
            Tau::run(block, staged, updates, i, static_cast<int>(row), static_cast<int>(column),
                     entries);
            block.each([&](int thread) {
                DOMERGE_UNROLL
                for (int e = 0; e < Tau::kEach * Tau::kEach; ++e) {
                    const int k = e / Tau::kEach, j = e % Tau::kEach;
                    if (row + Tau::Place::row(thread, k) >= m) continue;
                    if (column + Tau::Place::column(thread, j) >= n) continue;
                    const uint32_t bits = to_bits(entries[thread].at[k][j]) & 0x7fffffffu;
                    if (!behind)
                        count(bits, usual, counts);
                    else if (bits >> kLowBits == prefix)
                        add_atomically(counts + (bits & ((1u << kLowBits) - 1)), uint64_t{1});
                }
            });
        }
        block.each([&](int thread) {
            if (behind) return;
            for (uint32_t bin = thread; bin < kUsual; bin += kThreads)
                if (usual[bin] != 0) add_atomically(counts + kFirst + bin, uint64_t{usual[bin]});
        });
    }
};

struct SumParams {
    Updates updates;
    const TrimRow* trims;
    const DrawRow* draw;
    double* rows;
};

// A row of tiles of one update. Sums of its rows go to rows [2 T, m]: of all entries, of the kept.
template <class Format>
struct RowSums {
    using Params = SumParams;
    using Tau = Update<Format>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 2;
    static constexpr int kParts = 16;                             // as entries.py has them
    static constexpr int kEach = Tau::kSize * kParts / kThreads;  // parts that a thread sums
    static constexpr int kStride = Tau::kSize + 16;               // two rows in different banks
    static constexpr int64_t kSizes = Tau::kSize * kStride * sizeof(float);
    static constexpr int64_t kSharedBytes =
        Tau::kSharedBytes + kSizes + 2 * Tau::kSize * kParts * sizeof(double);
    static_assert(kSharedBytes <= kSmallestShared);

    struct Parts {
        double all[kEach];
        double kept[kEach];
    };

    static int64_t blocks(int64_t adapters, int64_t m, int64_t) {
        return adapters * tiles(m, Tau::kSize);
    }

    // |τ|, negative where it is not kept.
    static DOMERGE_DEVICE void mark(int thread, const Trimming& trim, int row, int column,
                                    const typename Tau::Place::Sums& entries, float* sizes) {
        DOMERGE_UNROLL
        for (int i = 0; i < Tau::kEach; ++i) {
            const int down = Tau::Place::row(thread, i), across = Tau::Place::column(thread, 0);
            bool kept[4];
            trim.keeps(row + down, column + across, entries.at[i], kept);
            Vector<float, 4> marked;
            DOMERGE_UNROLL
            for (int j = 0; j < 4; ++j)
                marked.at[j] = kept[j] ? std::fabs(entries.at[i][j]) : -std::fabs(entries.at[i][j]);
            vector_at<Vector<float, 4>>(sizes + down * kStride + across) = marked;
        }
    }

    static DOMERGE_DEVICE int row(int thread, int e) {
        return thread / kParts + e * (kThreads / kParts);
    }

    static DOMERGE_DEVICE void add(int thread, const float* sizes, Parts& parts) {
        for (int j = thread % kParts; j < Tau::kSize; j += kParts) {
            DOMERGE_UNROLL
            for (int e = 0; e < kEach; ++e) {
                const float size = sizes[row(thread, e) * kStride + j];
                parts.all[e] += std::fabs(size);
                parts.kept[e] += size > 0.0f ? size : 0.0f;
            }
        }
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const Updates& updates = params.updates;
        const int64_t m = updates.m(), i = block.index % updates.adapters;
        const int64_t first = block.index / updates.adapters * Tau::kSize;
        const int n = static_cast<int>(updates.n());
        const Trimming trim(params.trims[i], *params.draw);
        float* const staged = reinterpret_cast<float*>(block.shared);
        float* const sizes = reinterpret_cast<float*>(block.shared + Tau::kSharedBytes);
        double* const sums = reinterpret_cast<double*>(block.shared + Tau::kSharedBytes + kSizes);
        typename Tau::Entries entries;
        PerThread<Parts, kThreads> parts;
        block.each([&](int thread) {
            DOMERGE_UNROLL
            for (int e = 0; e < kEach; ++e) parts[thread].all[e] = parts[thread].kept[e] = 0.0;
        });
        for (int column = 0; column < n; column += Tau::kSize) {
            Tau::run(block, staged, updates, i, static_cast<int>(first), column, entries);
            block.each([&](int thread) {
                mark(thread, trim, static_cast<int>(first), column, entries[thread], sizes);
            });
            block.each([&](int thread) { add(thread, sizes, parts[thread]); });
        }
        block.each([&](int thread) {
            DOMERGE_UNROLL
            for (int e = 0; e < kEach; ++e) {
                double* const own = sums + row(thread, e) * kParts + thread % kParts;
                own[0] = parts[thread].all[e];
                own[Tau::kSize * kParts] = parts[thread].kept[e];
            }
        });
        block.each([&](int thread) {
            const int64_t line = first + thread % Tau::kSize;
            if (thread >= 2 * Tau::kSize || line >= m) return;
            double total = sums[thread * kParts];
            for (int k = 1; k < kParts; ++k) total += sums[thread * kParts + k];
            params.rows[(2 * i + thread / Tau::kSize) * m + line] = total;
        });
    }
};

struct TotalParams {
    const double* rows;
    int64_t m;
    double* totals;
};

// The sum of one line of rows [2 T, m], in order.
struct Totals {
    using Params = TotalParams;
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerSm = 4;
    static constexpr int64_t kChunk = 1024;
    static constexpr int64_t kSharedBytes = kChunk * sizeof(double);

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const double* const line = params.rows + block.index * params.m;
        double* const chunk = reinterpret_cast<double*>(block.shared);
        PerThread<double, kThreads> total;
        block.each([&](int thread) { total[thread] = 0.0; });
        for (int64_t begin = 0; begin < params.m; begin += kChunk) {
            const int64_t count = least(kChunk, params.m - begin);
            block.each([&](int thread) {
                for (int64_t r = thread; r < count; r += kThreads) chunk[r] = line[begin + r];
            });
            block.each([&](int thread) {
                if (thread != 0) return;
                for (int64_t r = 0; r < count; ++r) total[thread] += chunk[r];
            });
        }
        block.each([&](int thread) {
            if (thread == 0) params.totals[block.index] = total[thread];
        });
    }
};

enum class Sign : int { none = 0, total = 1, frequency = 2 };
enum class Mean : int { sum = 0, count = 1, weight = 2 };  // as backends/gpu/entries.py has them

struct MergeParams {
    Updates updates;
    const TrimRow* trims;
    const DrawRow* draw;
    const double* weights;
    Sign sign;
    bool weighted;
    Mean mean;
    float scale;
    float* out;
};

// One tile of ΔW. Both signs are merged until all have voted, so that each τ_i is made once.
template <class Format>
struct EntryMerge {
    using Params = MergeParams;
    using Tau = Update<Format>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 1;  // what registers allow
    static constexpr int64_t kSharedBytes = Tau::kSharedBytes;
    static_assert(kSharedBytes <= kSmallestShared);

    struct Side {
        float sum;
        float divisor;
    };

    struct Entry {
        float votes;
        Side plus;  // of all adapters where there is no election
        Side minus;
    };

    struct Entries {
        Entry at[Tau::kEach][Tau::kEach];
    };

    static int64_t blocks(int64_t m, int64_t n) {
        return tiles(m, Tau::kSize) * tiles(n, Tau::kSize);
    }

    static DOMERGE_DEVICE void agree(const Params& params, float weight, float value, Side& side) {
        side.sum = std::fma(weight, value, side.sum);
        side.divisor += params.mean == Mean::weight ? weight : 1.0f;
    }

    static DOMERGE_DEVICE void add(const Params& params, float weight, float value, Entry& entry) {
        if (params.sign == Sign::none) return agree(params, weight, value, entry.plus);
        const float vote = params.weighted ? weight * value : value;
        if (params.sign == Sign::frequency)
            entry.votes += vote > 0.0f ? 1.0f : vote < 0.0f ? -1.0f : 0.0f;
        else
            entry.votes = std::fma(params.weighted ? weight : 1.0f, value, entry.votes);
        if (vote > 0.0f) agree(params, weight, value, entry.plus);
        if (vote < 0.0f) agree(params, weight, value, entry.minus);
    }

    static DOMERGE_DEVICE float result(const Params& params, const Entry& entry) {
        const bool plus = entry.votes >= 0.0f;
        const float sum = plus ? entry.plus.sum : entry.minus.sum;
        const float divisor = plus ? entry.plus.divisor : entry.minus.divisor;
        const bool divided = params.mean != Mean::sum && divisor != 0.0f;
        return params.scale * (divided ? sum / divisor : sum);
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const Updates& updates = params.updates;
        const int64_t m = updates.m(), n = updates.n();
        const int64_t across = (n + Tau::kSize - 1) / Tau::kSize;
        const int row = static_cast<int>(block.index / across * Tau::kSize);
        const int column = static_cast<int>(block.index % across * Tau::kSize);
        float* const staged = reinterpret_cast<float*>(block.shared);
        typename Tau::Entries tau;
        PerThread<Entries, kThreads> merged;
        block.each([&](int thread) {
            DOMERGE_UNROLL
            for (int e = 0; e < Tau::kEach; ++e) DOMERGE_UNROLL
            for (int j = 0; j < Tau::kEach; ++j) merged[thread].at[e][j] = Entry{};
        });
        for (int64_t i = 0; i < updates.adapters; ++i) {
            Tau::run(block, staged, updates, i, row, column, tau);
            const Trimming trim(params.trims[i], *params.draw);
            const float weight = static_cast<float>(params.weights[i]);
            block.each([&](int thread) {
                DOMERGE_UNROLL
                for (int e = 0; e < Tau::kEach; ++e) {
                    const auto& entries = tau[thread].at[e];
                    bool kept[4];
                    trim.keeps(row + Tau::Place::row(thread, e),
                               column + Tau::Place::column(thread, 0), entries, kept);
                    DOMERGE_UNROLL
                    for (int j = 0; j < 4; ++j)
                        add(params, weight, kept[j] ? trim.value(entries[j]) : 0.0f,
                            merged[thread].at[e][j]);
                }
            });
        }
        block.each([&](int thread) {
            const int64_t near = column + Tau::Place::column(thread, 0);
            DOMERGE_UNROLL
            for (int e = 0; e < Tau::kEach; ++e) {
                const int64_t far = row + Tau::Place::row(thread, e);
                float values[4];
                DOMERGE_UNROLL
                for (int j = 0; j < 4; ++j) values[j] = result(params, merged[thread].at[e][j]);
                if (far < m && near < n)
                    store_as<Float32, 4>(params.out, far * n + near, values, n - near);
            }
        });
    }
};

Updates updates_of(const TableNumbers& table, const UpdateNumbers& updates) {
    return {table_of(table), at<const UpdateRow>(updates.rows), updates.adapters};
}

}  // namespace

void entry_counts(const TableNumbers& table, const UpdateNumbers& updates, Address prefixes,
                  Address counts, Stream stream) {
    const CountParams params{updates_of(table, updates), at<const int64_t>(prefixes),
                             at<uint64_t>(counts)};
    with_format(std::get<3>(table), [&](auto format) {
        using Kernel = EntryCounts<decltype(format)>;
        launch<Kernel>(Kernel::blocks(updates.adapters, updates.m, updates.n), Kernel::kSharedBytes,
                       params, stream);
    });
}

void entry_sums(const TableNumbers& table, const UpdateNumbers& updates, Address trims,
                Address draw, Address rows, Address totals, Stream stream) {
    const SumParams params{updates_of(table, updates), at<const TrimRow>(trims),
                           at<const DrawRow>(draw), at<double>(rows)};
    with_format(std::get<3>(table), [&](auto format) {
        using Kernel = RowSums<decltype(format)>;
        launch<Kernel>(Kernel::blocks(updates.adapters, updates.m, updates.n), Kernel::kSharedBytes,
                       params, stream);
    });
    const TotalParams total{at<const double>(rows), updates.m, at<double>(totals)};
    launch<Totals>(2 * updates.adapters, Totals::kSharedBytes, total, stream);
}

void entry_merge(const TableNumbers& table, const UpdateNumbers& updates, Address trims,
                 Address draw, Address weights, int sign, bool weighted, int mean, double scale,
                 Address out, Stream stream) {
    const MergeParams params{
        updates_of(table, updates), at<const TrimRow>(trims),  at<const DrawRow>(draw),
        at<const double>(weights),  static_cast<Sign>(sign),   weighted,
        static_cast<Mean>(mean),    static_cast<float>(scale), at<float>(out)};
    with_format(std::get<3>(table), [&](auto format) {
        using Kernel = EntryMerge<decltype(format)>;
        launch<Kernel>(Kernel::blocks(updates.m, updates.n), Kernel::kSharedBytes, params, stream);
    });
}

}  // namespace domerge
