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

// A problem's result, [rows, d], or [d, rows] in columns.
struct ApplyOut {
    const ApplyParams& params;
    int64_t offset;
    int rows;
    int d;
    bool columns;

    // Four elements from (row, column) on, in the direction of memory.
    DOMERGE_DEVICE void put(int row, int column, const float* values) const {
        if (row >= rows || column >= d) return;
        if (columns)
            store_four(params.out_dtype, params.out, offset + int64_t{column} * rows + row, values,
                       rows - row);
        else
            store_four(params.out_dtype, params.out, offset + int64_t{row} * d + column, values,
                       d - column);
    }
};

template <class Format, int kSize>
struct Apply {
    using Params = ApplyParams;
    using Product = domerge::Product<Format, kSize>;
    using Result = typename Product::Result;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = kSize < 64 ? 2 : 1;  // what registers allow
    static constexpr int64_t kSharedBytes = Product::kShared * sizeof(float);

    static DOMERGE_DEVICE void put(int thread, const typename Result::Sums& sums, int row,
                                   int column, const ApplyOut& out) {
        constexpr int rows = sizeof(sums.at) / sizeof(sums.at[0]);
        constexpr int columns = sizeof(sums.at[0]) / sizeof(float);
        if (out.columns) {
            DOMERGE_UNROLL
            for (int i = 0; i < rows; i += 4) DOMERGE_UNROLL
            for (int j = 0; j < columns; ++j) {
                const float values[] = {sums.at[i][j], sums.at[i + 1][j], sums.at[i + 2][j],
                                        sums.at[i + 3][j]};
                out.put(row + Result::row(thread, i), column + Result::column(thread, j), values);
            }
        } else {
            DOMERGE_UNROLL
            for (int i = 0; i < rows; ++i) DOMERGE_UNROLL
            for (int j = 0; j < columns; j += 4)
                out.put(row + Result::row(thread, i), column + Result::column(thread, j),
                        &sums.at[i][j]);
        }
    }

    // X itself: memory in, memory out.
    static DOMERGE_DEVICE void copy(int thread, const Reader<Format>& x, int first_row,
                                    int first_column, const ApplyOut& out) {
        constexpr int lanes = kLanes<Format>, columns = Product::kColumns;
        for (int v = thread; v < kSize * columns / lanes; v += kThreads) {
            const int across = out.columns ? kSize / lanes : columns / lanes;
            const int near = v % across * lanes, far = v / across;
            const int row = first_row + (out.columns ? near : far);
            const int column = first_column + (out.columns ? far : near);
            float values[lanes];
            x.scale(x.read(row, column), row, values);
            DOMERGE_UNROLL
            for (int i = 0; i < lanes; i += 4)
                out.put(row + (out.columns ? i : 0), column + (out.columns ? 0 : i), values + i);
        }
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const ApplyTile& tile = params.tiles[block.index];
        const ApplyWork& work = params.work[tile.problem];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> x(params.table, problem, problem.rank, problem.d);
        const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
        const ApplyOut out{params, work.offset, static_cast<int>(work.rows), x.end, x.columns};
        if (work.coefficients == 0) {
            block.each([&](int thread) { copy(thread, x, row, column, out); });
            return;
        }
        const Matrix c{reinterpret_cast<const float*>(work.coefficients), out.rows, x.rows};
        typename Product::Sums sums;
        Product::run(block, reinterpret_cast<float*>(block.shared), c, x, row, column, sums);
        block.each([&](int thread) { put(thread, sums[thread], row, column, out); });
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
