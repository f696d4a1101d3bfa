#include "tensor_product.h"

namespace domerge {

namespace {

constexpr int kSplitRows = 16;

struct SplitTile {
    int64_t problem;
    int64_t row;
};

struct SplitWork {
    Address coefficients;
    int64_t rows;
    Address parts;
};

struct SplitParams {
    Table table;
    const SplitTile* tiles;
    const SplitWork* work;
};

template <class Format>
struct Split {
    using Params = SplitParams;
    static constexpr int kThreads = 64;
    static constexpr int kBlocksPerSm = 16;
    static constexpr bool kScaled = std::is_same_v<Format, Float16>;
    static constexpr int64_t kSharedBytes = kScaled ? kSplitRows * sizeof(uint32_t) : 0;

    struct Rows {
        const Matrix c;
        const Reader<Format> x;
        const SplitMatrix parts;
        const int first, count;
        uint32_t* const tops;  // the bits of the largest magnitude of every row

        DOMERGE_DEVICE Rows(const Params& params, const Block<kThreads>& block,
                            const SplitTile& tile, const ProblemRow& problem, const SplitWork& work)
            : c(work.coefficients, static_cast<int>(work.rows), static_cast<int>(problem.rank)),
              x(params.table, problem, problem.rank, problem.d),
              parts(work.parts, c.rows, c.columns),
              first(static_cast<int>(tile.row)),
              count(least(c.rows - first, kSplitRows)),
              tops(reinterpret_cast<uint32_t*>(block.shared)) {}

        // visit(row, unit): all units of these rows, a thread some of them.
        template <class Visit>
        DOMERGE_DEVICE void each(int thread, Visit visit) const {
            DOMERGE_ROLLED
            for (int v = thread; v < count * parts.units; v += kThreads)
                visit(v / parts.units, v % parts.units);
        }

        // Eight numbers of a row, each times the scale of its row of X.
        DOMERGE_DEVICE void read(int row, int unit, float (&to)[8]) const {
            const int k = 8 * unit;
            DOMERGE_UNROLL
            for (int i = 0; i < 8; i += 4) {
                const Words words = c.read(first + row, k + i);
                DOMERGE_UNROLL
                for (int l = 0; l < 4; ++l) to[i + l] = from_bits(words.at[l]);
            }
            if (k >= x.rows) return;
            float scale = static_cast<float>(x.block(k).scale);
            const bool alike = x.owner[k] == x.owner[least(k + 8, x.rows) - 1];
            DOMERGE_UNROLL
            for (int i = 0; i < 8; ++i) {
                if (!alike && k + i < x.rows) scale = static_cast<float>(x.block(k + i).scale);
                to[i] *= scale;
            }
        }

        DOMERGE_DEVICE void find_tops(Block<kThreads>& block) const {
            block.each([&](int thread) {
                if (thread < kSplitRows) tops[thread] = 0;
            });
            block.each([&](int thread) {
                each(thread, [&](int row, int unit) {
                    float values[8];
                    read(row, unit, values);
                    uint32_t top = 0;
                    DOMERGE_UNROLL
                    for (int i = 0; i < 8; ++i) {
                        const uint32_t size = to_bits(values[i]) & 0x7fffffffu;
                        top = size > top ? size : top;
                    }
                    raise_atomically(tops + row, top);
                });
            });
        }

        // A power of two, and its inverse, that brings the largest of a row to 2^14.
        DOMERGE_DEVICE float factor(int row) const {
            if constexpr (!kScaled) return 1.0f;
            const uint32_t exponent = tops[row] >> 23;
            return from_bits((exponent < 15 ? 253 : 268 - exponent) << 23);
        }
        DOMERGE_DEVICE float inverse(int row) const {
            const uint32_t exponent = tops[row] >> 23;
            return from_bits((exponent < 15 ? 1 : exponent - 14) << 23);
        }

        DOMERGE_DEVICE void split(int row, int unit) const {
            float values[8];
            read(row, unit, values);
            const float size = factor(row);
            Words high, low;
            DOMERGE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float a = values[2 * i] * size, b = values[2 * i + 1] * size;
                high.at[i] = pack<Format>(a, b);
                low.at[i] = pack<Format>(a - Format::load(static_cast<uint16_t>(high.at[i])),
                                         b - Format::load(static_cast<uint16_t>(high.at[i] >> 16)));
            }
            Words* const to = parts.at(first + row, unit);
            to[0] = high;
            to[parts.units] = low;
        }
    };

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const SplitTile& tile = params.tiles[block.index];
        const Rows rows(params, block, tile, params.table.problems[tile.problem],
                        params.work[tile.problem]);
        if constexpr (kScaled) rows.find_tops(block);
        block.each([&](int thread) {
            rows.each(thread, [&](int row, int unit) { rows.split(row, unit); });
            if constexpr (kScaled)
                if (thread < rows.count)
                    rows.parts.inverse(rows.first + thread) = rows.inverse(thread);
        });
    }
};

}  // namespace

int64_t split_rows() {
    return kSplitRows;
}

int64_t split_numbers(int64_t rows, int64_t columns) {
    return rows * ((columns + 15) / 16 * 16 + 1);
}

bool takes_parts(int dtype, int out_dtype) {
    bool found = false;
    with_format(dtype, [&](auto format) {
        on_tensor_cores<decltype(format)>(static_cast<DType>(out_dtype),
                                          [&](auto wanted) { found = decltype(wanted)::value; });
    });
    return found;
}

void split(const TableNumbers& table, Address tiles, int64_t tile_count, Address work,
           Stream stream) {
    const SplitParams params{table_of(table), at<const SplitTile>(tiles),
                             at<const SplitWork>(work)};
    with_format(std::get<3>(table), [&](auto format) {
        using Format = decltype(format);
        if constexpr (std::is_same_v<Format, Float32>)
            throw std::invalid_argument("products of float32 take C itself");
        else
            launch<Split<Format>>(tile_count, Split<Format>::kSharedBytes, params, stream);
    });
}

}  // namespace domerge
