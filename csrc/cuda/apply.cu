#include "product.h"
#include "tensor_product.h"

namespace domerge {

namespace {

using ApplySizes = Sizes<16, 32, 64, 128>;

// Columns of X that a block does, tile after tile.
constexpr int kSpan = 512;

struct ApplyTile {
    int64_t problem;
    int64_t row;
    int64_t column;
};

struct ApplyWork {
    Address coefficients;  // or their parts
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

    // Eight 16-bit elements.
    DOMERGE_DEVICE void put_words(int line, int position, Words words) const {
        if (line >= lines || position >= length) return;
        uint16_t* to = static_cast<uint16_t*>(params.out) + offset;
        to += int64_t{line} * length + position;
        const int count = least(length - position, 8);
        if (count == 8 && is_aligned(to, 16)) {
            vector_at<Words>(to) = words;
            return;
        }
        DOMERGE_ROLLED
        for (int i = 0; i < count; ++i) {
            to[i] = static_cast<uint16_t>(words.at[0]);
            append<uint16_t>(words, nullptr);
        }
    }

    DOMERGE_DEVICE uint32_t packed(float first, float second) const {
        return params.out_dtype == DType::bfloat16 ? pack<BFloat16>(first, second)
                                                   : pack<Float16>(first, second);
    }
};

// X itself: memory in, memory out.
template <class Format, int kSize>
struct Copy {
    static constexpr int kColumns = kTileColumns<kSize>;

    template <int kLength>
    static DOMERGE_DEVICE void tile(int thread, const Reader<Format>& x, int line, int position,
                                    const ApplyOut& out) {
        constexpr int lanes = kLanes<Format>;
        DOMERGE_ROLLED
        for (int v = thread; v < kSize * kColumns / lanes; v += kBlockThreads) {
            const int far = line + v / (kLength / lanes);
            const int near = position + v % (kLength / lanes) * lanes;
            const int row = x.columns ? near : far, column = x.columns ? far : near;
            float values[lanes];
            x.scale(x.read(row, column), row, values);
            out.template put<lanes>(far, near, values);
        }
    }

    static DOMERGE_DEVICE void run(const ApplyParams& params, Block<kBlockThreads>& block,
                                   const ApplyTile& span, const Reader<Format>& x) {
        const int row = static_cast<int>(span.row), begin = static_cast<int>(span.column);
        const int end = least(begin + kSpan, x.end);
        block.each([&](int thread) {
            const ApplyOut out(params, span.problem);
            DOMERGE_ROLLED
            for (int column = begin; column < end; column += kColumns) {
                if (x.columns)
                    tile<kSize>(thread, x, column, row, out);
                else
                    tile<kColumns>(thread, x, row, column, out);
            }
        });
    }
};

// A warp's part of C X to where it belongs, in lines as the result has them.
template <class Format, int kSize, bool kInColumns>
struct WriteOut {
    using Product = TensorProduct<Format, kSize>;
    using Shape = typename Product::template Shape<kInColumns>;
    using Sums = typename Product::Sums;

    // visit(i, half, row): every eight rows of a warp's part, of X^T C^T in columns.
    template <class Visit>
    static DOMERGE_DEVICE void each_rows(int warp, Visit visit) {
        DOMERGE_UNROLL
        for (int i = 0; i < Shape::kDown; ++i) DOMERGE_UNROLL
        for (int half = 0; half < 2; ++half) visit(i, half, Shape::row(warp) + 16 * i + 8 * half);
    }

    // A lane's two neighbours in one of those rows, and in eight columns.
    static DOMERGE_DEVICE void values(const Product& product, const Sums16x8& sums, int lane,
                                      int half, int row, int column, float (&to)[2]) {
        DOMERGE_UNROLL
        for (int l = 0; l < 2; ++l)
            to[l] = sums.of(lane)[2 * half + l] * product.inverse(kInColumns ? column + l : row);
    }

    // line, position: where the tile begins.
    static DOMERGE_DEVICE void pairs(const Product& product, int warp, const Sums& sums, int line,
                                     int position, const ApplyOut& out) {
        each_rows(warp, [&](int i, int half, int first) {
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int j = 0; j < Shape::kAcross; ++j) {
                    const int row = first + lane / 4;
                    const int column = Shape::column(warp) + 8 * j + lane % 4 * 2;
                    float found[2];
                    values(product, sums.at[i * Shape::kAcross + j], lane, half, row, column,
                           found);
                    out.template put<2>(line + row, position + column, found);
                }
            });
        });
    }

    static DOMERGE_DEVICE void words(const Product& product, int warp, const Sums& sums, int line,
                                     int position, const ApplyOut& out) {
        each_rows(warp, [&](int i, int half, int first) {
            DOMERGE_UNROLL
            for (int j = 0; j < Shape::kAcross; j += 4) {
                Fragment<uint32_t, 4> packed;
                lanes([&](int lane) {
                    DOMERGE_UNROLL
                    for (int l = 0; l < 4; ++l) {
                        const int column = Shape::column(warp) + 8 * (j + l) + lane % 4 * 2;
                        float found[2];
                        values(product, sums.at[i * Shape::kAcross + j + l], lane, half,
                               first + lane / 4, column, found);
                        packed.of(lane)[l] = out.packed(found[0], found[1]);
                    }
                });
                transpose_quads(packed);
                lanes([&](int lane) {
                    const auto& own = packed.of(lane);
                    out.put_words(line + first + lane / 4,
                                  position + Shape::column(warp) + 8 * (j + lane % 4),
                                  Words{{own[0], own[1], own[2], own[3]}});
                });
            }
        });
    }

    static DOMERGE_DEVICE void run(const Product& product, int warp, const Sums& sums, int line,
                                   int position, const ApplyOut& out) {
        if constexpr (Shape::kAcross % 4 == 0) {
            if (Product::kAlways16Bit || out.params.out_dtype != DType::float32)
                return words(product, warp, sums, line, position, out);
        }
        pairs(product, warp, sums, line, position, out);
    }
};

template <class Format, int kSize>
struct TensorApply {
    using Params = ApplyParams;
    using Product = TensorProduct<Format, kSize>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 1;
    static constexpr int64_t kSharedBytes = Product::kSharedBytes;

    template <bool kInColumns>
    static DOMERGE_DEVICE void multiply(const Params& params, Block<kThreads>& block,
                                        const ApplyTile& tile, const Reader<Format>& x) {
        const ApplyWork& work = params.work[tile.problem];
        const Product product(block.shared);
        const SplitMatrix c(work.coefficients, static_cast<int>(work.rows), x.rows);
        const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column);
        const int columns = least(x.end - column, kSpan);
        typename Product::WarpSums sums;
        product.template run<kInColumns>(
            block, c, x, row, column, (columns + Product::kColumns - 1) / Product::kColumns, sums,
            [&](int warp, int number, const typename Product::Sums& found) {
                const ApplyOut out(params, tile.problem);
                const int at = column + number * Product::kColumns;
                WriteOut<Format, kSize, kInColumns>::run(
                    product, warp, found, kInColumns ? at : row, kInColumns ? row : at, out);
            });
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const ApplyTile& tile = params.tiles[block.index];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> x(params.table, problem, problem.rank, problem.d);
        if (params.work[tile.problem].coefficients == 0)
            Copy<Format, kSize>::run(params, block, tile, x);
        else if (x.columns)
            multiply<true>(params, block, tile, x);
        else
            multiply<false>(params, block, tile, x);
    }
};

template <class Format, int kSize>
struct Apply {
    using Params = ApplyParams;
    using Product = domerge::Product<Format, kSize>;
    using Result = typename Product::Result;
    using Four = Vector<float, 4>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = 1;  // what registers allow
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

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const ApplyTile& tile = params.tiles[block.index];
        const ApplyWork& work = params.work[tile.problem];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> x(params.table, problem, problem.rank, problem.d);
        if (work.coefficients == 0) return Copy<Format, kSize>::run(params, block, tile, x);
        const int row = static_cast<int>(tile.row), begin = static_cast<int>(tile.column);
        const Matrix c(work.coefficients, static_cast<int>(work.rows), x.rows);
        float* const shared = reinterpret_cast<float*>(block.shared);
        for (int column = begin; column < least(begin + kSpan, x.end); column += kColumns) {
            typename Product::Sums sums;
            Product::run(block, shared, c, x, row, column, sums);
            block.each([&](int thread) { gather(thread, sums[thread], x.columns, shared); });
            block.each([&](int thread) {
                const ApplyOut out(params, tile.problem);
                if (x.columns)
                    write_out<kSize>(thread, shared, column, row, out);
                else
                    write_out<kColumns>(thread, shared, row, column, out);
            });
        }
    }
};

}  // namespace

std::vector<int64_t> apply_sizes() {
    return ApplySizes::list();
}

int64_t apply_columns(int64_t size) {
    ApplySizes::with(size, [](auto) {});
    return kSpan;
}

void apply(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count, Address work,
           Address out, int out_dtype, Stream stream) {
    const ApplyParams params{table_of(table), at<const ApplyTile>(tiles), at<const ApplyWork>(work),
                             at<void>(out), static_cast<DType>(out_dtype)};
    ApplySizes::with(size, [&](auto chosen) {
        with_format(std::get<3>(table), [&](auto format) {
            using Format = decltype(format);
            constexpr int kSize = decltype(chosen)::value;
            on_tensor_cores<Format>(params.out_dtype, [&](auto wanted) {
                using Kernel = std::conditional_t<decltype(wanted)::value,
                                                  TensorApply<Format, kSize>, Apply<Format, kSize>>;
                launch<Kernel>(tile_count, Kernel::kSharedBytes, params, stream);
            });
        });
    });
}

}  // namespace domerge
