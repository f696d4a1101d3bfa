#include "product.h"

namespace domerge {

namespace {

using ApplySizes = Sizes<16, 32, 64, 128>;

struct ApplyTile {
    int64_t problem;
    int64_t row;
    int64_t column;
};

struct ApplyWork {
    Address coefficients;
    int64_t rows;
    int64_t offset;
};

struct ApplyParams {
    Table table;
    const ApplyTile* tiles;
    const ApplyWork* work;
    void* out;
    DType out_dtype;
};

// A problem's result as it lies in memory: its rows, or its columns in columns.
struct ApplyOut {
    const ApplyParams& params;
    int64_t offset;
    int lines;
    int length;  // of a line

    DOMERGE_DEVICE ApplyOut(const ApplyParams& params, int64_t problem)
        : params(params), offset(params.work[problem].offset) {
        const ProblemRow& x = params.table.problems[problem];
        const int rows = static_cast<int>(params.work[problem].rows), d = static_cast<int>(x.d);
        lines = x.columns != 0 ? d : rows;
        length = x.columns != 0 ? rows : d;
    }

    template <int kCount>
    DOMERGE_DEVICE void put(int line, int position, const float* values) const {
        if (line >= lines || position >= length) return;
        store_values<kCount>(params.out_dtype, params.out,
                             offset + int64_t{line} * length + position, values, length - position);
    }
};

template <class Format, int kSize>
struct Apply {
    using Params = ApplyParams;
    using Product = domerge::Product<Format, kSize>;
    using Result = typename Product::Result;
    using Four = Vector<float, 4>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = kSize < 64 ? 2 : 1;  // what registers allow
    static constexpr int kColumns = Product::kColumns;
    static constexpr int kTile = kSize * kColumns;
    // The operands of the product, and after it the tile.
    static constexpr int64_t kSharedBytes =
        sizeof(float) * (Product::kShared > kTile ? Product::kShared : kTile);
    static_assert(kSharedBytes <= kSmallestShared);

    // Four elements of a line, in shared memory where threads side by side use different banks.
    template <int kLength>
    static DOMERGE_DEVICE Four& four(float* tile, int line, int position) {
        return vector_at<Four>(tile + line * kLength + (position ^ line / 4 * 4 % kLength));
    }

    // tile = the threads' sums, in lines as the result has them.
    static DOMERGE_DEVICE void gather(int thread, const typename Result::Sums& sums,
                                      bool in_columns, float* tile) {
        constexpr int rows = sizeof(sums.at) / sizeof(sums.at[0]);
        constexpr int columns = sizeof(sums.at[0]) / sizeof(float);
        const auto& at = sums.at;
        if (in_columns) {
            DOMERGE_UNROLL
            for (int i = 0; i < rows; i += 4) DOMERGE_UNROLL
            for (int j = 0; j < columns; ++j)
                four<kSize>(tile, Result::column(thread, j), Result::row(thread, i)) = {
                    at[i][j], at[i + 1][j], at[i + 2][j], at[i + 3][j]};
        } else {
            DOMERGE_UNROLL
            for (int i = 0; i < rows; ++i) DOMERGE_UNROLL
            for (int j = 0; j < columns; j += 4)
                four<kColumns>(tile, Result::row(thread, i), Result::column(thread, j)) = {
                    at[i][j], at[i][j + 1], at[i][j + 2], at[i][j + 3]};
        }
    }

    template <int kLength>
    static DOMERGE_DEVICE void write_out(int thread, float* tile, int line, int position,
                                         const ApplyOut& out) {
        DOMERGE_ROLLED
        for (int v = thread; v < kTile / 4; v += kThreads) {
            const int far = v / (kLength / 4), near = v % (kLength / 4) * 4;
            const Four values = four<kLength>(tile, far, near);
            out.template put<4>(line + far, position + near, values.at);
        }
    }

    // X itself: memory in, memory out.
    template <int kLength>
    static DOMERGE_DEVICE void copy(int thread, const Reader<Format>& x, int line, int position,
                                    const ApplyOut& out) {
        constexpr int lanes = kLanes<Format>;
        DOMERGE_ROLLED
        for (int v = thread; v < kTile / lanes; v += kThreads) {
            const int far = line + v / (kLength / lanes);
            const int near = position + v % (kLength / lanes) * lanes;
            const int row = x.columns ? near : far, column = x.columns ? far : near;
            float values[lanes];
            x.scale(x.read(row, column), row, values);
            out.template put<lanes>(far, near, values);
        }
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const ApplyTile& tile = params.tiles[block.index];
        const ApplyWork& work = params.work[tile.problem];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> x(params.table, problem, problem.rank, problem.d);
        const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
        if (work.coefficients == 0) {
            block.each([&](int thread) {
                if (x.columns)
                    copy<kSize>(thread, x, column, row, ApplyOut(params, tile.problem));
                else
                    copy<kColumns>(thread, x, row, column, ApplyOut(params, tile.problem));
            });
            return;
        }
        const Matrix c{reinterpret_cast<const float*>(work.coefficients),
                       static_cast<int>(work.rows), x.rows};
        float* const shared = reinterpret_cast<float*>(block.shared);
        typename Product::Sums sums;
        Product::run(block, shared, c, x, row, column, sums);
        block.each([&](int thread) { gather(thread, sums[thread], x.columns, shared); });
        block.each([&](int thread) {
            const ApplyOut out(params, tile.problem);
            if (x.columns)
                write_out<kSize>(thread, shared, tile.column, tile.row, out);
            else
                write_out<kColumns>(thread, shared, tile.row, tile.column, out);
        });
    }
};

}  // namespace

std::vector<int64_t> apply_sizes() {
    return ApplySizes::list();
}

int64_t apply_columns(int64_t size) {
    int64_t columns = 0;
    ApplySizes::with(size, [&](auto chosen) { columns = kTileColumns<decltype(chosen)::value>; });
    return columns;
}

void apply(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count, Address work,
           Address out, int out_dtype, Stream stream) {
    const ApplyParams params{table_of(table), at<const ApplyTile>(tiles), at<const ApplyWork>(work),
                             at<void>(out), static_cast<DType>(out_dtype)};
    ApplySizes::with(size, [&](auto chosen) {
        with_format(std::get<3>(table), [&](auto format) {
            using Kernel = Apply<decltype(format), decltype(chosen)::value>;
            launch<Kernel>(tile_count, Kernel::kSharedBytes, params, stream);
        });
    });
}

}  // namespace domerge
