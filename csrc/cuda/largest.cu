#include "table.h"

namespace domerge {

namespace {

struct LargestTile {
    int64_t tensor;
    Address data;
    int64_t count;
};

struct LargestParams {
    const LargestTile* tiles;
    uint32_t* tops;
};

// By the bits of the magnitudes, as float32 at the end: Inf is above all numbers, NaN above Inf.
template <class Format>
struct Largest {
    using Params = LargestParams;
    using Storage = typename Format::Storage;
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerSm = 4;
    static constexpr bool kHalf = sizeof(Storage) == 2;
    static constexpr uint32_t kMagnitude = kHalf ? 0x7fffu : 0x7fffffffu;

    static DOMERGE_DEVICE uint32_t larger(uint32_t top, uint32_t element) {
        const uint32_t size = element & kMagnitude;
        return size > top ? size : top;
    }

    static DOMERGE_DEVICE uint32_t larger(uint32_t top, const Words& words) {
        DOMERGE_UNROLL
        for (int i = 0; i < 4; ++i) {
            top = larger(top, words.at[i]);
            if constexpr (kHalf) top = larger(top, words.at[i] >> 16);
        }
        return top;
    }

    static DOMERGE_DEVICE uint32_t widened(uint32_t size) {
        if constexpr (kHalf) return to_bits(Format::load(static_cast<Storage>(size)));
        return size;
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const LargestTile& tile = params.tiles[block.index];
        const auto* data = global(reinterpret_cast<const Storage*>(tile.data));
        const int64_t whole = is_aligned(data, 16) ? tile.count / kLanes<Format> : 0;
        block.each([&](int thread) {
            uint32_t top = 0;
            for (int64_t v = thread; v < whole; v += kThreads) {
                const Words words = vector_at<const Words>(data + v * kLanes<Format>);
                top = larger(top, words);
            }
            for (int64_t i = whole * kLanes<Format> + thread; i < tile.count; i += kThreads)
                top = larger(top, Format::bits(data[i]));
            if (top != 0) raise_atomically(params.tops + tile.tensor, widened(top));
        });
    }
};

}  // namespace

void largest(int dtype, Address tiles, int64_t count, Address tops, Stream stream) {
    const LargestParams params{at<const LargestTile>(tiles), at<uint32_t>(tops)};
    with_format(dtype,
                [&](auto format) { launch<Largest<decltype(format)>>(count, 0, params, stream); });
}

}  // namespace domerge
