#include <algorithm>

#include "double_gram.h"

namespace domerge {

namespace {

struct BlockGramWork {
    int64_t problem;
    int64_t block;
    int64_t rank;
    int64_t offset;
};

struct BlockGramParams {
    Table table;
    const BlockGramWork* work;
    double* out;
};

template <class Format>
struct BlockGram {
    using Params = BlockGramParams;
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerSm = 2;  // what registers allow
    template <int kSize>
    using Product = DoubleGram<Format, kSize, kThreads>;
    static constexpr int64_t kSharedBytes =
        std::max({Product<8>::kSharedBytes, Product<16>::kSharedBytes, Product<32>::kSharedBytes,
                  Product<64>::kSharedBytes});
    static_assert(kSharedBytes <= kSmallestShared);

    // Tile by tile, as many as the block's rank takes.
    template <int kSize>
    static DOMERGE_DEVICE void tiles(const Params& params, Block<kThreads>& block) {
        const BlockGramWork& work = params.work[block.index];
        const ProblemRow& problem = params.table.problems[work.problem];
        const BlockRow& own = params.table.blocks[work.block];
        const Reader<Format> reader(params.table, problem, own.first_row + work.rank, problem.d);
        const double* const product = reinterpret_cast<const double*>(block.shared);
        double* const out = params.out + work.offset;
        const int first = static_cast<int>(own.first_row);
        for (int row = 0; row < work.rank; row += kSize) {
            for (int column = 0; column <= row; column += kSize) {
                Product<kSize>::run(block, reader, first + row, first + column);
                block.each([&](int thread) {
                    for (int e = thread; e < kSize * kSize; e += kThreads) {
                        const int64_t i = row + e / kSize, j = column + e % kSize;
                        if (i >= work.rank || j > i) continue;
                        const double value =
                            own.scale * own.scale *
                            Product<kSize>::gather(product, row == column, e / kSize, e % kSize);
                        out[i * work.rank + j] = value;
                        out[j * work.rank + i] = value;
                    }
                });
            }
        }
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const int64_t rank = params.work[block.index].rank;
        if (rank <= 8)
            tiles<8>(params, block);
        else if (rank <= 16)
            tiles<16>(params, block);
        else if (rank <= 32)
            tiles<32>(params, block);
        else
            tiles<64>(params, block);
    }
};

}  // namespace

void block_gram(const TableNumbers& table, Address work, int64_t count, Address out,
                Stream stream) {
    const BlockGramParams params{table_of(table), at<const BlockGramWork>(work), at<double>(out)};
    with_format(std::get<3>(table), [&](auto format) {
        using Kernel = BlockGram<decltype(format)>;
        launch<Kernel>(count, Kernel::kSharedBytes, params, stream);
    });
}

}  // namespace domerge
