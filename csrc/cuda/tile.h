// Products of tiles in shared memory, summed in registers, and the way of their operands there.
#pragma once

#include "table.h"

namespace domerge {

constexpr int kBlockThreads = 256;

constexpr int least_of(int a, int b) {
    return a < b ? a : b;
}

constexpr int round_up(int n, int multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

// A product of kRows x kColumns. Each thread has kM x kN of it, in pieces of four by four; where
// that occupies fewer threads than there are, groups of them share the depth.
template <class T, int kRows, int kColumns, int kM, int kN>
struct Tile {
    static constexpr int kDown = kRows / kM, kAcross = kColumns / kN;
    static constexpr int kGroups = kBlockThreads / (kDown * kAcross);
    static constexpr int kNear = kAcross < 8 ? kAcross : 8;  // a warp reads few distinct vectors
    static_assert(kGroups * kDown * kAcross == kBlockThreads && kM % 4 == 0 && kN % 4 == 0);

    struct Sums {
        T at[kM][kN];
    };

    static DOMERGE_DEVICE int group(int thread) { return thread / (kDown * kAcross); }

    // The row of a thread's i-th sum. From a multiple of four on, four are consecutive.
    static DOMERGE_DEVICE int row(int thread, int i) {
        return i / 4 * (kRows / (kM / 4)) + thread / kNear % kDown * 4 + i % 4;
    }
    static DOMERGE_DEVICE int column(int thread, int j) {
        const int far = thread / (kNear * kDown) % (kAcross / kNear);
        return j / 4 * (kColumns / (kN / 4)) + (far * kNear + thread % kNear) * 4 + j % 4;
    }

    static DOMERGE_DEVICE void clear(Sums& sums) {
        DOMERGE_UNROLL
        for (int i = 0; i < kM; ++i) DOMERGE_UNROLL
        for (int j = 0; j < kN; ++j) sums.at[i][j] = T{0};
    }

    // sums += left^T right over a depth that all groups share: left [depth, kLeft] and right
    // [depth, kRight] in shared memory.
    template <int kDepth, int kLeft, int kRight>
    static DOMERGE_DEVICE void add_product(int thread, const T* left, const T* right, Sums& sums) {
        constexpr int kOwn = kDepth / kGroups;
        static_assert(kOwn * kGroups == kDepth);
        left += group(thread) * kOwn * kLeft;
        right += group(thread) * kOwn * kRight;
        DOMERGE_UNROLL
        for (int k = 0; k < kOwn; ++k) {
            Vector<T, 4> a[kM / 4], b[kN / 4];
            DOMERGE_UNROLL
            for (int i = 0; i < kM / 4; ++i)
                a[i] = vector_at<const Vector<T, 4>>(left + k * kLeft + row(thread, 4 * i));
            DOMERGE_UNROLL
            for (int j = 0; j < kN / 4; ++j)
                b[j] = vector_at<const Vector<T, 4>>(right + k * kRight + column(thread, 4 * j));
            DOMERGE_UNROLL
            for (int i = 0; i < kM; ++i) DOMERGE_UNROLL
            for (int j = 0; j < kN; ++j) sums.at[i][j] += a[i / 4].at[i % 4] * b[j / 4].at[j % 4];
        }
    }

    // Every group's sums [kGroups, kRows, kColumns + 1] in shared memory.
    static constexpr int kSpreadStride = kColumns + 1;
    static constexpr int kSpread = kGroups * kRows * kSpreadStride;

    static DOMERGE_DEVICE void spread(int thread, const Sums& sums, T* to) {
        DOMERGE_UNROLL
        for (int i = 0; i < kM; ++i) DOMERGE_UNROLL
        for (int j = 0; j < kN; ++j)
            to[(group(thread) * kRows + row(thread, i)) * kSpreadStride + column(thread, j)] =
                sums.at[i][j];
    }

    // One entry of the product, the groups added in order.
    static DOMERGE_DEVICE T gather(const T* spread, int row, int column) {
        T sum = spread[row * kSpreadStride + column];
        for (int g = 1; g < kGroups; ++g) sum += spread[(g * kRows + row) * kSpreadStride + column];
        return sum;
    }
};

// Brings a piece of a matrix to a tile [kDepth, kStride] in shared memory, kLines wide. Vectors of
// memory run along the lines, or across them (then they are transposed on the way).
template <class Format, class T, int kDepth, int kLines>
struct Stage {
    static constexpr int kStride = kLines + 4;  // aligned, and few bank conflicts either way
    static constexpr int kSize = kDepth * kStride;
    static constexpr int kCount = kLanes<Format>;
    static constexpr int kVectors = kDepth * kLines / kCount;
    static constexpr int kEach = (kVectors + kBlockThreads - 1) / kBlockThreads;
    static_assert(kDepth % (2 * kCount) == 0 && kLines % 8 == 0);

    // What a thread holds between memory and the tile.
    struct Held {
        Words at[kEach];
    };

    // The depth and the line where a vector starts. Across, a warp takes two vectors of each of 16
    // lines: whole sectors of memory, and different banks.
    static DOMERGE_DEVICE int depth(int vector, bool across) {
        if (!across) return vector / (kLines / kCount);
        return (vector % 2 + vector / (2 * kLines) * 2) * kCount;
    }
    static DOMERGE_DEVICE int line(int vector, bool across) {
        return across ? vector / 2 % kLines : vector % (kLines / kCount) * kCount;
    }

    // read(depth, line) gives every vector of this thread.
    template <class Read>
    static DOMERGE_DEVICE void fetch(int thread, bool across, Held& held, Read read) {
        DOMERGE_UNROLL
        for (int e = 0; e < kEach; ++e) {
            const int v = thread + e * kBlockThreads;
            if (v < kVectors) held.at[e] = read(depth(v, across), line(v, across));
        }
    }

    // convert(words, depth, line, values) makes numbers of them.
    template <class Convert>
    static DOMERGE_DEVICE void put(int thread, bool across, const Held& held, T* tile,
                                   Convert convert) {
        DOMERGE_UNROLL
        for (int e = 0; e < kEach; ++e) {
            const int v = thread + e * kBlockThreads;
            if (v >= kVectors) break;
            float values[kCount];
            convert(held.at[e], depth(v, across), line(v, across), values);
            T* to = tile + depth(v, across) * kStride + line(v, across);
            if (across) {
                DOMERGE_UNROLL
                for (int i = 0; i < kCount; ++i) to[i * kStride] = values[i];
            } else {
                DOMERGE_UNROLL
                for (int i = 0; i < kCount; i += 4)
                    vector_at<Vector<T, 4>>(to + i) = {values[i], values[i + 1], values[i + 2],
                                                       values[i + 3]};
            }
        }
    }
};

}  // namespace domerge
