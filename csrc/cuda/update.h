// A tile of τ_i = s_i B_i A_i in registers, to the bit as domerge_fast/entries.py has it.
#pragma once

#include "tile.h"

namespace domerge {

// Adapter i: its rows of both stacked factors, and s_i.
struct UpdateRow {
    int64_t first_row;
    int64_t rank;
    double scale;
};

// problems: A [R, n], then B^T [R, m], both read unscaled.
struct Updates {
    Table table;
    const UpdateRow* rows;
    int64_t adapters;

    DOMERGE_DEVICE int64_t m() const { return table.problems[1].d; }
    DOMERGE_DEVICE int64_t n() const { return table.problems[0].d; }
};

// A square tile; each thread has 4 x 4 of it, in whole quads of columns.
template <class Format>
struct Update {
    static constexpr int kSize = 64;
    static constexpr int kEach = 4;
    using Place = Tile<float, kSize, kSize, kEach, kEach>;
    static constexpr int kDepth = 2 * kLanes<Format>;
    using Staged = Stage<Format, float, kDepth, kSize>;
    using Entries = PerThread<typename Place::Sums, kBlockThreads>;
    static constexpr int kBuffer = 2 * Staged::kSize;
    static constexpr int64_t kSharedBytes = 2 * kBuffer * sizeof(float);
    static_assert(Place::kGroups == 1);

    // Summed one after the other, unlike in Tile::add_product rounded once a product for certain.
    static DOMERGE_DEVICE void add_product(int thread, const float* left, const float* right,
                                           typename Place::Sums& sums) {
        using Four = Vector<float, kEach>;
        DOMERGE_UNROLL
        for (int k = 0; k < kDepth; ++k) {
            const Four b =
                vector_at<const Four>(left + k * Staged::kStride + Place::row(thread, 0));
            const Four a =
                vector_at<const Four>(right + k * Staged::kStride + Place::column(thread, 0));
            DOMERGE_UNROLL
            for (int i = 0; i < kEach; ++i) DOMERGE_UNROLL
            for (int j = 0; j < kEach; ++j)
                sums.at[i][j] = std::fma(b.at[i], a.at[j], sums.at[i][j]);
        }
    }

    // entries = τ_i[row, column] and what follows, 0 beyond its edges.
    static DOMERGE_DEVICE void run(Block<kBlockThreads>& block, float* shared,
                                   const Updates& updates, int64_t i, int row, int column,
                                   Entries& entries) {
        const UpdateRow& own = updates.rows[i];
        const ProblemRow* const problems = updates.table.problems;
        const int64_t end = own.first_row + own.rank;
        const Reader<Format> a(updates.table, problems[0], end, problems[0].d);
        const Reader<Format> b(updates.table, problems[1], end, problems[1].d);
        const int first = static_cast<int>(own.first_row), rank = static_cast<int>(own.rank);
        const auto fetch = [&](int thread, const Reader<Format>& x, int k, int line,
                               typename Staged::Held& held) {
            Staged::fetch(thread, x.columns, held, [&](int depth, int offset) {
                return x.read(first + k + depth, line + offset);
            });
        };
        const auto put = [&](int thread, const Reader<Format>& x, const typename Staged::Held& held,
                             float* to) {
            Staged::put(
                thread, x.columns, held, to,
                [](const Words& words, int, int, auto& values) { unpack<Format>(words, values); });
        };
        const auto stage = [&](int thread, int k, float* to, auto meanwhile) {
            typename Staged::Held left, right;
            fetch(thread, b, k, row, left);
            fetch(thread, a, k, column, right);
            meanwhile();
            put(thread, b, left, to);
            put(thread, a, right, to + Staged::kSize);
        };
        block.each([&](int thread) {
            Place::clear(entries[thread]);
            stage(thread, 0, shared, [] {});
        });
        int now = 0;
        for (int k = 0; k < rank; k += kDepth, now ^= 1) {
            const float* const left = shared + now * kBuffer;
            block.each([&](int thread) {
                stage(thread, k + kDepth, shared + (now ^ 1) * kBuffer,
                      [&] { add_product(thread, left, left + Staged::kSize, entries[thread]); });
            });
        }
        const float scale = static_cast<float>(own.scale);
        block.each([&](int thread) {
            DOMERGE_UNROLL
            for (int e = 0; e < kEach; ++e) DOMERGE_UNROLL
            for (int j = 0; j < kEach; ++j) entries[thread].at[e][j] *= scale;
        });
    }
};

}  // namespace domerge
