#include "tensor_gram.h"

namespace domerge {

namespace {

using GramSizes = Sizes<16, 32, 64, 128>;

struct GramTile {
    int64_t problem;
    int64_t i;
    int64_t j;
    int64_t begin;
    int64_t end;
    int64_t part;
    int64_t offset;
};

struct GramSum {
    int64_t problem;
    int64_t i;
    int64_t j;
    int64_t first;
    int64_t count;
    int64_t offset;
};

struct GramParams {
    Table table;
    const GramTile* tiles;
    const GramSum* sums;
    float* parts;
    float* out;
};

// Rows from `row`, and columns from `column` on, of a problem's G.
struct Target {
    const Table& table;
    const ProblemRow& problem;
    float* gram;
    int64_t row;
    int64_t column;

    DOMERGE_DEVICE double scale(int64_t i) const {
        return table.blocks[table.owner[problem.first_owner + i]].scale;
    }

    // One entry at or below the diagonal, scaled, and its mirror image.
    DOMERGE_DEVICE void put(int64_t i, int64_t j, float value) const {
        i += row;
        j += column;
        if (i >= problem.rank || j > i) return;
        value = static_cast<float>(scale(i) * scale(j) * value);
        gram[i * problem.rank + j] = value;
        gram[j * problem.rank + i] = value;
    }
};

template <class Format, int kSize>
struct Gram {
    using Params = GramParams;
    using Product = TensorGram<Format, kSize>;
    static constexpr int kThreads = Product::kThreads;
    // What registers allow.
    static constexpr int kBlocksPerSm = kSize <= 64 ? 2 : 1;
    static_assert(Product::kSharedBytes <= kSmallestShared);

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const GramTile& tile = params.tiles[block.index];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> reader(params.table, problem, problem.rank, tile.end);
        const int row = static_cast<int>(tile.i) * kSize, column = static_cast<int>(tile.j) * kSize;
        Product::run(block, reader, row, column, static_cast<int>(tile.begin));
        const float* const product = reinterpret_cast<const float*>(block.shared);
        const Target target{params.table, problem, params.out + tile.offset, row, column};
        block.each([&](int thread) {
            for (int e = thread; e < kSize * kSize; e += kThreads) {
                const float value = Product::gather(product, e / kSize, e % kSize);
                if (tile.part < 0)
                    target.put(e / kSize, e % kSize, value);
                else
                    params.parts[tile.part * kSize * kSize + e] = value;
            }
        });
    }
};

// The parts of one tile, in order: kPieces blocks for each.
template <int kSize>
struct SumParts {
    using Params = GramParams;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 4;
    static constexpr int kTile = kSize * kSize;
    static constexpr int kPieces = kTile < 1024 ? 1 : kTile / 1024;

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const GramSum& sum = params.sums[block.index / kPieces];
        const ProblemRow& problem = params.table.problems[sum.problem];
        const Target target{params.table, problem, params.out + sum.offset, sum.i * kSize,
                            sum.j * kSize};
        const int begin = static_cast<int>(block.index % kPieces) * (kTile / kPieces);
        block.each([&](int thread) {
            for (int e = begin + thread; e < begin + kTile / kPieces; e += kThreads) {
                const float* part = params.parts + sum.first * kTile + e;
                float total = 0.0f;
                for (int64_t k = 0; k < sum.count; ++k) total += part[k * kTile];
                target.put(e / kSize, e % kSize, total);
            }
        });
    }
};

}  // namespace

std::vector<int64_t> gram_sizes() {
    return GramSizes::list();
}

void gram(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count, Address sums,
          int64_t sum_count, Address parts, Address out, Stream stream) {
    const GramParams params{table_of(table), at<const GramTile>(tiles), at<const GramSum>(sums),
                            at<float>(parts), at<float>(out)};
    GramSizes::with(size, [&](auto chosen) {
        constexpr int kSize = decltype(chosen)::value;
        with_format(std::get<3>(table), [&](auto format) {
            using Kernel = Gram<decltype(format), kSize>;
            launch<Kernel>(tile_count, Kernel::Product::kSharedBytes, params, stream);
        });
        using Sum = SumParts<kSize>;
        launch<Sum>(sum_count * Sum::kPieces, 0, params, stream);
    });
}

}  // namespace domerge
