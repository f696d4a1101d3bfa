// Which entries of an update are kept: Trim and Draw of domerge_fast/entries.py, without spread.
#pragma once

#include "table.h"

namespace domerge {

struct TrimRow {
    double low;
    double high;
    double keep;
    double gain;
    int64_t rescale;
    int64_t number;  // of the adapter
};

struct DrawRow {
    int64_t low_key;
    int64_t high_key;
    int64_t module;
};

DOMERGE_DEVICE uint32_t upper_half(uint32_t a, uint32_t b) {
    return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}

// Philox4x32-10. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
DOMERGE_DEVICE Words philox(Words x, uint32_t low_key, uint32_t high_key) {
    constexpr uint32_t kFirst = 0xd2511f53u, kSecond = 0xcd9e8d57u;
    DOMERGE_UNROLL
    for (int round = 0; round < 10; ++round) {
        x = {{upper_half(kSecond, x.at[2]) ^ x.at[1] ^ low_key, kSecond * x.at[2],
              upper_half(kFirst, x.at[0]) ^ x.at[3] ^ high_key, kFirst * x.at[0]}};
        low_key += 0x9e3779b9u;
        high_key += 0xbb67ae85u;
    }
    return x;
}

// a b, never fused with an addition that follows.
DOMERGE_DEVICE float product(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

// One adapter's rule, in float32.
struct Trimming {
    float low;
    float high;
    float keep;
    float gain;
    bool rescale;
    uint32_t number;
    uint32_t low_key;
    uint32_t high_key;
    uint32_t module;

    DOMERGE_DEVICE Trimming(const TrimRow& trim, const DrawRow& draw)
        : low(static_cast<float>(trim.low)),
          high(static_cast<float>(trim.high)),
          keep(static_cast<float>(trim.keep)),
          gain(static_cast<float>(trim.gain)),
          rescale(trim.rescale != 0),
          number(static_cast<uint32_t>(trim.number)),
          low_key(static_cast<uint32_t>(draw.low_key)),
          high_key(static_cast<uint32_t>(draw.high_key)),
          module(static_cast<uint32_t>(draw.module)) {}

    // Whether each of four entries is kept. column: of the first, a multiple of four.
    DOMERGE_DEVICE void keeps(int row, int column, const float (&entries)[4],
                              bool (&kept)[4]) const {
        Words words{};
        if (keep < 1.0f)
            words = philox(
                {{static_cast<uint32_t>(column) / 4, static_cast<uint32_t>(row), number, module}},
                low_key, high_key);
        DOMERGE_UNROLL
        for (int j = 0; j < 4; ++j) {
            const float size = std::fabs(entries[j]);
            const float drawn = static_cast<float>(words.at[j] >> 8) * 0x1p-24f;
            kept[j] = size >= low && size <= high && drawn < keep;
        }
    }

    // v of an entry that is kept.
    DOMERGE_DEVICE float value(float entry) const {
        const float grown = product(gain, entry);
        return rescale ? grown / keep : grown;
    }
};

}  // namespace domerge
