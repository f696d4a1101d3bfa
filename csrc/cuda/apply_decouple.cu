#include "product.h"

namespace domerge {

namespace {

using DecoupleSizes = Sizes<16, 32, 64, 128, 256>;

// As in backends/torch.py: a magnitude below this share of ||B_i|| ||a|| is rounding noise.
constexpr float kZeroColumn = 1e-6f;

struct DecoupleTile {
    int64_t problem;
    int64_t column;
    int64_t slot;
};

struct DecoupleWork {
    Address coefficients;
    int64_t offset;
};

struct DecoupleParams {
    Table table;
    const DecoupleTile* tiles;
    const DecoupleWork* work;
    const int64_t* offsets;
    const float* roots;
    const float* norms;
    const double* omegas;
    double scale;
    double* energies;
    int64_t slots;
    void* out;
    DType out_dtype;
};

// ||S a||^2 and ||a||^2 of one column a [rank] of a tile, S row-major [rank, rank].
struct Squares {
    float mapped = 0.0f;
    float own = 0.0f;

    DOMERGE_DEVICE Squares(const float* s, int rank, const float* a, int stride) {
        const Matrix root{s, rank, rank};
        for (int i = 0; i < rank; i += 4) {
            float sums[4] = {};
            for (int j = 0; j < rank; j += 4) {
                DOMERGE_UNROLL
                for (int l = 0; l < 4; ++l) add_row(root, i + l, j, a, stride, sums[l]);
            }
            DOMERGE_UNROLL
            for (int l = 0; l < 4; ++l) mapped += sums[l] * sums[l];
        }
        for (int i = 0; i < rank; ++i) own += a[i * stride] * a[i * stride];
    }

    // Four products of a row of S.
    static DOMERGE_DEVICE void add_row(const Matrix& root, int row, int j, const float* a,
                                       int stride, float& sum) {
        const Words words = root.read(row, j);
        DOMERGE_UNROLL
        for (int l = 0; l < 4; ++l)
            if (j + l < root.columns) sum += from_bits(words.at[l]) * a[(j + l) * stride];
    }
};

template <class Format, int kSize>
struct ApplyDecouple {
    using Params = DecoupleParams;
    using Product = domerge::Product<Format, kSize>;
    using Result = typename Product::Result;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kBlocksPerSm = kSize < 64 ? 2 : 1;  // what registers allow
    static constexpr int kColumns = Product::kColumns;
    static constexpr int kStride = kColumns + 4;
    static constexpr int kAtOnce = 16;  // adapters
    static constexpr int kParts = 16;   // of the columns, for the energies

    // In shared memory: the operands of the product, and after it C A, the magnitudes of some
    // adapters and parts of their energies; then the merged magnitude.
    static constexpr int kValues = kSize * kStride;
    static constexpr int kMagnitudes = kAtOnce * kColumns;
    static constexpr int kLater = kMagnitudes + 2 * kAtOnce * kParts;
    static constexpr int kShared =
        kValues + kLater > Product::kShared ? kValues + kLater : Product::kShared;
    static constexpr int64_t kSharedBytes = sizeof(float) * (kShared + kColumns);
    static_assert(kSharedBytes <= kSmallestShared);

    struct Shared {
        float* operands;
        float* values;
        float* magnitudes;
        double* parts;
        float* merged;

        DOMERGE_DEVICE explicit Shared(char* shared)
            : operands(reinterpret_cast<float*>(shared)),
              values(operands),
              magnitudes(values + kValues),
              parts(reinterpret_cast<double*>(magnitudes + kMagnitudes)),
              merged(operands + kShared) {}
    };

    using Four = Vector<float, 4>;
    static DOMERGE_DEVICE Four& four(float* values, int row, int column) {
        return vector_at<Four>(values + row * kStride + column);
    }

    // values = C A, or A where there is no C; the merged magnitude starts at 0.
    static DOMERGE_DEVICE void multiply(const Params& params, Block<kThreads>& block,
                                        const DecoupleTile& tile, const Reader<Format>& a,
                                        const Shared& shared) {
        const Address coefficients = params.work[tile.problem].coefficients;
        const int column = static_cast<int>(tile.column);
        if (coefficients == 0) {
            block.each([&](int thread) {
                constexpr int lanes = kLanes<Format>, across = kColumns / lanes;
                for (int v = thread; v < a.rows * across; v += kThreads) {
                    const int row = v / across, c = v % across * lanes;
                    float values[lanes];
                    a.scale(a.read(row, column + c), row, values);
                    DOMERGE_UNROLL
                    for (int i = 0; i < lanes; i += 4)
                        four(shared.values, row, c + i) = {values[i], values[i + 1], values[i + 2],
                                                           values[i + 3]};
                }
                for (int c = thread; c < kColumns; c += kThreads) shared.merged[c] = 0.0f;
            });
            return;
        }
        const Matrix c{reinterpret_cast<const float*>(coefficients), a.rows, a.rows};
        typename Product::Sums sums;
        Product::run(block, shared.operands, c, a, 0, column, sums);
        block.each([&](int thread) {
            constexpr int rows = sizeof(sums[0].at) / sizeof(sums[0].at[0]);
            constexpr int columns = sizeof(sums[0].at[0]) / sizeof(float);
            DOMERGE_UNROLL
            for (int i = 0; i < rows; ++i) DOMERGE_UNROLL
            for (int j = 0; j < columns; j += 4) {
                const float* from = &sums[thread].at[i][j];
                four(shared.values, Result::row(thread, i), Result::column(thread, j)) = {
                    from[0], from[1], from[2], from[3]};
            }
            for (int c = thread; c < kColumns; c += kThreads) shared.merged[c] = 0.0f;
        });
    }

    // Finds the magnitude of one column of an adapter, and divides the column by it.
    static DOMERGE_DEVICE float decouple(const Params& params, int64_t adapter, int rank,
                                         float* a) {
        const float norm = params.norms[adapter];
        const Squares squares(params.roots + params.offsets[adapter], rank, a, kStride);
        const float relative = std::sqrt(squares.mapped);
        const bool live = relative > std::sqrt(squares.own) * kZeroColumn;
        const float magnitude = live ? relative * norm : 0.0f;
        const float weight = static_cast<float>(params.omegas[adapter] * params.scale);
        const float factor = magnitude > 0.0f ? weight / magnitude : 0.0f;
        for (int i = 0; i < rank; ++i) a[i * kStride] *= factor;
        return magnitude;
    }

    // Some of the adapters, from problem.first_block + first on.
    static DOMERGE_DEVICE void decouple_some(const Params& params, Block<kThreads>& block,
                                             const DecoupleTile& tile, const ProblemRow& problem,
                                             int first, const Shared& shared) {
        const int count = least(static_cast<int>(problem.blocks) - first, kAtOnce);
        const int64_t adapter = problem.first_block + first;
        const BlockRow* const rows = params.table.blocks + adapter;
        const int end = static_cast<int>(problem.rank);
        block.each([&](int thread) {
            for (int e = thread; e < count * kColumns; e += kThreads) {
                const int b = e / kColumns, row = static_cast<int>(rows[b].first_row);
                const bool last = first + b + 1 == problem.blocks;
                const int rank = (last ? end : static_cast<int>(rows[b + 1].first_row)) - row;
                shared.magnitudes[e] = decouple(params, adapter + b, rank,
                                                shared.values + row * kStride + e % kColumns);
            }
        });
        block.each([&](int thread) {
            for (int c = thread; c < kColumns; c += kThreads)
                for (int b = 0; b < count; ++b)
                    shared.merged[c] += static_cast<float>(std::abs(params.omegas[adapter + b])) *
                                        shared.magnitudes[b * kColumns + c];
            for (int e = thread; e < count * kParts; e += kThreads) {
                double sum = 0.0;
                for (int c = e % kParts; c < kColumns; c += kParts) {
                    const double value = shared.magnitudes[e / kParts * kColumns + c];
                    sum += value * value;
                }
                shared.parts[e] = sum;
            }
        });
        block.each([&](int thread) {
            for (int b = thread; b < count; b += kThreads) {
                double sum = 0.0;
                for (int p = 0; p < kParts; ++p) sum += shared.parts[b * kParts + p];
                params.energies[(adapter + b) * params.slots + tile.slot] = sum;
            }
        });
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const DecoupleTile& tile = params.tiles[block.index];
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> a(params.table, problem, problem.rank, problem.d);
        const Shared shared(block.shared);
        multiply(params, block, tile, a, shared);
        for (int first = 0; first < problem.blocks; first += kAtOnce)
            decouple_some(params, block, tile, problem, first, shared);
        const int64_t offset = params.work[tile.problem].offset + tile.column;
        const int columns = least(a.end - static_cast<int>(tile.column), kColumns);
        block.each([&](int thread) {
            for (int e = 4 * thread; e < a.rows * kColumns; e += 4 * kThreads) {
                const int row = e / kColumns, c = e % kColumns;
                if (c >= columns) continue;
                Four values = four(shared.values, row, c);
                const Four merged = four(shared.merged, 0, c);
                DOMERGE_UNROLL
                for (int i = 0; i < 4; ++i) values.at[i] *= merged.at[i];
                store_values<4>(params.out_dtype, params.out, offset + int64_t{row} * a.end + c,
                                values.at, columns - c);
            }
        });
    }
};

}  // namespace

std::vector<int64_t> apply_decouple_sizes() {
    return DecoupleSizes::list();
}

int64_t apply_decouple_columns(int64_t size) {
    int64_t columns = 0;
    DecoupleSizes::with(size,
                        [&](auto chosen) { columns = kTileColumns<decltype(chosen)::value>; });
    return columns;
}

void apply_decouple(const TableNumbers& table, int64_t size, Address tiles, int64_t tile_count,
                    const Decoupling& numbers, Address out, int out_dtype, Stream stream) {
    const DecoupleParams params{table_of(table),
                                at<const DecoupleTile>(tiles),
                                at<const DecoupleWork>(numbers.work),
                                at<const int64_t>(numbers.offsets),
                                at<const float>(numbers.roots),
                                at<const float>(numbers.norms),
                                at<const double>(numbers.omegas),
                                numbers.scale,
                                at<double>(numbers.energies),
                                numbers.slots,
                                at<void>(out),
                                static_cast<DType>(out_dtype)};
    DecoupleSizes::with(size, [&](auto chosen) {
        with_format(std::get<3>(table), [&](auto format) {
            using Kernel = ApplyDecouple<decltype(format), decltype(chosen)::value>;
            launch<Kernel>(tile_count, Kernel::kSharedBytes, params, stream);
        });
    });
}

}  // namespace domerge
