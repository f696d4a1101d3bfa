#include <algorithm>

#include "decouple_product.h"
#include "magnitudes.h"

namespace domerge {

namespace {

// The last is for all larger R: C A then waits in scratch memory, not in shared memory.
using DecoupleSizes = Sizes<16, 32, 64, 128, 256, 512>;

template <int kSize>
constexpr bool kOnChip = kSize <= 256;
template <int kSize>
constexpr int kProductRows = kOnChip<kSize> ? kSize : 128;

constexpr int64_t kMostScratch = 256 << 20;

// As in backends/torch.py: a magnitude below this share of ||B_i|| ||a|| is rounding noise.
constexpr float kZeroColumn = 1e-6f;

struct DecoupleTile {
    int64_t problem;
    int64_t column;
    int64_t slot;
};

struct DecoupleWork {
    Address coefficients;  // or their parts
    int64_t offset;
};

struct DecoupleParams {
    Table table;
    const DecoupleTile* tiles;
    int64_t tile_count;
    int64_t blocks;
    const DecoupleWork* work;
    const int64_t* offsets;
    const float* roots;
    const float* norms;
    const double* omegas;
    double scale;
    double* energies;
    int64_t slots;
    float* scratch;
    int64_t block_scratch;  // numbers
    void* out;
    DType out_dtype;
};

template <class Format, int kSize, bool kTensor>
struct ApplyDecouple {
    using Params = DecoupleParams;
    static constexpr int kRows = kProductRows<kSize>;
    using Product =
        std::conditional_t<kTensor, OnTensorCores<Format, kRows>, OnUnits<Format, kRows>>;
    static constexpr int kThreads = kBlockThreads;
    static constexpr int kWarps = kThreads / kLanesOfWarp;
    static constexpr int kBlocksPerSm = !kTensor && kSize == 32 ? 2 : 1;  // what registers allow
    static constexpr int kColumns = kTileColumns<kRows>;
    static constexpr int kStride = kColumns + 8;
    using Magnitudes = domerge::Magnitudes<kStride>;
    static constexpr int kAtOnce = 16;  // adapters
    static constexpr int kParts = 16;   // of the columns, for the energies

    // In shared memory: the operands of the product, and after it C A, the magnitudes of some
    // adapters and parts of their energies; then the merged magnitude.
    static constexpr int kValues = kOnChip<kSize> ? kRows * kStride : 0;
    static constexpr int kMagnitudes = kAtOnce * kColumns;
    static constexpr int64_t kLaterBytes =
        sizeof(float) * (kValues + kMagnitudes) + sizeof(double) * kAtOnce * kParts;
    static constexpr int64_t kUsedBytes = std::max(Product::kSharedBytes, kLaterBytes);
    static constexpr int64_t kSharedBytes = kUsedBytes + sizeof(float) * kColumns;
    static_assert(kSharedBytes <= kSmallestShared);

    struct Places {
        float* values;
        float* magnitudes;
        double* parts;
        float* merged;

        DOMERGE_DEVICE Places(const Params& params, const Block<kThreads>& block) {
            float* const shared = reinterpret_cast<float*>(block.shared);
            if constexpr (kOnChip<kSize>)
                values = shared;
            else
                values = global(params.scratch + block.index * params.block_scratch);
            magnitudes = shared + kValues;
            parts = reinterpret_cast<double*>(magnitudes + kMagnitudes);
            merged = reinterpret_cast<float*>(block.shared + kUsedBytes);
        }
    };

    using Four = Vector<float, 4>;
    static DOMERGE_DEVICE Four& four(float* values, int row, int column) {
        return vector_at<Four>(values + row * kStride + column);
    }

    // values = C A, or A where there is no C; the merged magnitude starts at 0.
    static DOMERGE_DEVICE void multiply(const Params& params, Block<kThreads>& block,
                                        const DecoupleTile& tile, const Reader<Format>& a,
                                        const Places& at) {
        const Address coefficients = params.work[tile.problem].coefficients;
        const int column = static_cast<int>(tile.column);
        if (coefficients == 0) {
            block.each([&](int thread) { copy(thread, a, column, at.values); });
        } else {
            const typename Product::Coefficients c(coefficients, a.rows, a.rows);
            for (int row = 0; row < a.rows; row += kRows)
                Product::template run<kStride>(block, c, a, row, column, at.values + row * kStride);
        }
        block.each([&](int thread) {
            for (int c = thread; c < kColumns; c += kThreads) at.merged[c] = 0.0f;
        });
    }

    static DOMERGE_DEVICE void copy(int thread, const Reader<Format>& a, int column,
                                    float* values) {
        constexpr int lanes = kLanes<Format>, across = kColumns / lanes;
        for (int v = thread; v < a.rows * across; v += kThreads) {
            const int row = v / across, c = v % across * lanes;
            float found[lanes];
            a.scale(a.read(row, column + c), row, found);
            DOMERGE_UNROLL
            for (int i = 0; i < lanes; i += 4)
                four(values, row, c + i) = {found[i], found[i + 1], found[i + 2], found[i + 3]};
        }
    }

    // Finds the magnitudes of some columns of an adapter, and divides the columns by them.
    static DOMERGE_DEVICE void decouple(const Params& params, int64_t adapter, int rank, float* a,
                                        float* magnitudes) {
        const Magnitudes squares(params.roots + params.offsets[adapter], rank, a);
        const float norm = params.norms[adapter];
        const float weight = static_cast<float>(params.omegas[adapter] * params.scale);
        typename Magnitudes::Each factors;
        lanes([&](int lane) {
            DOMERGE_UNROLL
            for (int j = 0; j < 4; ++j) {
                const float relative = std::sqrt(squares.mapped.of(lane)[j]);
                const bool live = relative > std::sqrt(squares.own.of(lane)[j]) * kZeroColumn;
                const float magnitude = live ? relative * norm : 0.0f;
                factors.of(lane)[j] = magnitude > 0.0f ? weight / magnitude : 0.0f;
                if (lane % 4 == 0) magnitudes[lane / 4 + 8 * j] = magnitude;
            }
        });
        Magnitudes::scale(a, rank, factors);
    }

    // Some of the adapters, from problem.first_block + first on.
    static DOMERGE_DEVICE void decouple_some(const Params& params, Block<kThreads>& block,
                                             const DecoupleTile& tile, const ProblemRow& problem,
                                             int first, const Places& at) {
        const int count = least(static_cast<int>(problem.blocks) - first, kAtOnce);
        const int64_t adapter = problem.first_block + first;
        const BlockRow* const rows = params.table.blocks + adapter;
        const int end = static_cast<int>(problem.rank);
        block.warps([&](int warp) {
            constexpr int kAcross = kColumns / Magnitudes::kColumns;
            DOMERGE_ROLLED
            for (int e = warp; e < count * kAcross; e += kWarps) {
                const int b = e / kAcross, column = e % kAcross * Magnitudes::kColumns;
                const int row = static_cast<int>(rows[b].first_row);
                const bool last = first + b + 1 == problem.blocks;
                const int rank = (last ? end : static_cast<int>(rows[b + 1].first_row)) - row;
                decouple(params, adapter + b, rank, at.values + row * kStride + column,
                         at.magnitudes + b * kColumns + column);
            }
        });
        block.each([&](int thread) {
            for (int c = thread; c < kColumns; c += kThreads)
                for (int b = 0; b < count; ++b)
                    at.merged[c] += static_cast<float>(std::abs(params.omegas[adapter + b])) *
                                    at.magnitudes[b * kColumns + c];
            for (int e = thread; e < count * kParts; e += kThreads) {
                double sum = 0.0;
                for (int c = e % kParts; c < kColumns; c += kParts) {
                    const double value = at.magnitudes[e / kParts * kColumns + c];
                    sum += value * value;
                }
                at.parts[e] = sum;
            }
        });
        block.each([&](int thread) {
            for (int b = thread; b < count; b += kThreads) {
                double sum = 0.0;
                for (int p = 0; p < kParts; ++p) sum += at.parts[b * kParts + p];
                params.energies[(adapter + b) * params.slots + tile.slot] = sum;
            }
        });
    }

    // The columns times their merged magnitudes, eight at a time.
    static DOMERGE_DEVICE void write_out(int thread, const Params& params, int64_t offset, int rows,
                                         int columns, int64_t pitch, const Places& at) {
        for (int e = 8 * thread; e < rows * kColumns; e += 8 * kThreads) {
            const int row = e / kColumns, c = e % kColumns;
            if (c >= columns) continue;
            float values[8];
            DOMERGE_UNROLL
            for (int i = 0; i < 8; i += 4) {
                const Four own = four(at.values, row, c + i), merged = four(at.merged, 0, c + i);
                DOMERGE_UNROLL
                for (int l = 0; l < 4; ++l) values[i + l] = own.at[l] * merged.at[l];
            }
            const int64_t to = offset + row * pitch + c;
            if (params.out_dtype == DType::float32) {
                store_as<Float32, 4>(params.out, to, values, columns - c);
                store_as<Float32, 4>(params.out, to + 4, values + 4, columns - c - 4);
            } else if (params.out_dtype == DType::bfloat16) {
                store_as<BFloat16, 8>(params.out, to, values, columns - c);
            } else {
                store_as<Float16, 8>(params.out, to, values, columns - c);
            }
        }
    }

    static DOMERGE_DEVICE void make(const Params& params, Block<kThreads>& block,
                                    const DecoupleTile& tile, const Places& places) {
        const ProblemRow& problem = params.table.problems[tile.problem];
        const Reader<Format> a(params.table, problem, problem.rank, problem.d);
        multiply(params, block, tile, a, places);
        for (int first = 0; first < problem.blocks; first += kAtOnce)
            decouple_some(params, block, tile, problem, first, places);
        const int64_t offset = params.work[tile.problem].offset + tile.column;
        const int columns = least(a.end - static_cast<int>(tile.column), kColumns);
        block.each(
            [&](int thread) { write_out(thread, params, offset, a.rows, columns, a.end, places); });
    }

    // A tile a block, or tile after tile where there are as many blocks as have scratch memory.
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const Places places(params, block);
        if constexpr (kOnChip<kSize>)
            make(params, block, params.tiles[block.index], places);
        else
            for (int64_t i = block.index; i < params.tile_count; i += params.blocks)
                make(params, block, params.tiles[i], places);
    }
};

// How many blocks do the tiles of a launch, and the numbers that each has in scratch memory.
struct DecoupleSpread {
    int64_t blocks;
    int64_t numbers = 0;

    template <int kSize>
    DecoupleSpread(Size<kSize>, int64_t tiles, int64_t rank) : blocks(tiles) {
        constexpr int kRows = kProductRows<kSize>;
        if (kOnChip<kSize> || tiles == 0) return;
        numbers = (rank + kRows - 1) / kRows * kRows * (kTileColumns<kRows> + 8);
        const int64_t fit = kMostScratch / (numbers * static_cast<int64_t>(sizeof(float)));
        blocks = std::min({tiles, current_device().multiprocessors, std::max<int64_t>(fit, 1)});
    }
};

}  // namespace

std::vector<int64_t> apply_decouple_sizes() {
    return DecoupleSizes::list();
}

int64_t apply_decouple_columns(int64_t size) {
    int64_t columns = 0;
    DecoupleSizes::with(
        size, [&](auto chosen) { columns = kTileColumns<kProductRows<decltype(chosen)::value>>; });
    return columns;
}

int64_t apply_decouple_scratch(int64_t size, int64_t tiles, int64_t rank) {
    int64_t bytes = 0;
    DecoupleSizes::with(size, [&](auto chosen) {
        const DecoupleSpread spread(chosen, tiles, rank);
        bytes = spread.blocks * spread.numbers * static_cast<int64_t>(sizeof(float));
    });
    return bytes;
}

void apply_decouple(const TableNumbers& table, int64_t size, int64_t rank, Address tiles,
                    int64_t tile_count, const Decoupling& numbers, Address out, int out_dtype,
                    Stream stream) {
    DecoupleSizes::with(size, [&](auto chosen) {
        constexpr int kSize = decltype(chosen)::value;
        const DecoupleSpread spread(chosen, tile_count, rank);
        const DecoupleParams params{table_of(table),
                                    at<const DecoupleTile>(tiles),
                                    tile_count,
                                    spread.blocks,
                                    at<const DecoupleWork>(numbers.work),
                                    at<const int64_t>(numbers.offsets),
                                    at<const float>(numbers.roots),
                                    at<const float>(numbers.norms),
                                    at<const double>(numbers.omegas),
                                    numbers.scale,
                                    at<double>(numbers.energies),
                                    numbers.slots,
                                    at<float>(numbers.scratch),
                                    spread.numbers,
                                    at<void>(out),
                                    static_cast<DType>(out_dtype)};
        with_format(std::get<3>(table), [&](auto format) {
            using Format = decltype(format);
            on_tensor_cores<Format>(params.out_dtype, [&](auto wanted) {
                using Kernel = ApplyDecouple<Format, kSize, decltype(wanted)::value>;
                launch<Kernel>(spread.blocks, Kernel::kSharedBytes, params, stream);
            });
        });
    });
}

}  // namespace domerge
