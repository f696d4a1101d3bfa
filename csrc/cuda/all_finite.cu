#include "table.h"

namespace domerge {

namespace {

struct FiniteTile {
    int64_t tensor;
    Address data;
    int64_t count;
};

struct FiniteParams {
    const FiniteTile* tiles;
    int32_t* flags;
};

// NaN and Inf have all exponent bits set. Every block that finds one writes the same 0.
template <class Format>
struct AllFinite {
    using Params = FiniteParams;
    using Storage = typename Format::Storage;
    static constexpr int kThreads = 256;
    static constexpr int kBlocksPerSm = 4;

    static DOMERGE_DEVICE bool is_finite(uint32_t element) {
        return (element & Format::kExponent) != Format::kExponent;
    }

    static DOMERGE_DEVICE bool is_finite(const Words& words) {
        bool finite = true;
        DOMERGE_UNROLL
        for (int i = 0; i < 4; ++i) {
            finite &= is_finite(words.at[i]);
            if (sizeof(Storage) == 2) finite &= is_finite(words.at[i] >> 16);
        }
        return finite;
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const FiniteTile& tile = params.tiles[block.index];
        const auto* data = global(reinterpret_cast<const Storage*>(tile.data));
        const int64_t whole = is_aligned(data, 16) ? tile.count / kLanes<Format> : 0;
        block.each([&](int thread) {
            bool finite = true;
            for (int64_t v = thread; v < whole; v += kThreads)
                finite &= is_finite(vector_at<const Words>(data + v * kLanes<Format>));
            for (int64_t i = whole * kLanes<Format> + thread; i < tile.count; i += kThreads)
                finite &= is_finite(Format::bits(data[i]));
            if (!finite) params.flags[tile.tensor] = 0;
        });
    }
};

}  // namespace

void all_finite(int dtype, Address tiles, int64_t count, Address flags, Stream stream) {
    const FiniteParams params{at<const FiniteTile>(tiles), at<int32_t>(flags)};
    with_format(
        dtype, [&](auto format) { launch<AllFinite<decltype(format)>>(count, 0, params, stream); });
}

}  // namespace domerge
