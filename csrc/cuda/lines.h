// X in shared memory as it lies in memory, for tensor cores: kRows stacked rows and kColumns
// columns, in lines that run along the rows, or along the columns where X is in columns.
#pragma once

#include "copies.h"
#include "tf32.h"

namespace domerge {

template <class Format, bool kInColumns, int kRows, int kColumns, int kThreads>
struct Lines {
    using Storage = typename Format::Storage;
    static constexpr bool kWhole = sizeof(Storage) == 4;  // elements are words
    static constexpr int kVector = kLanes<Format>;
    static constexpr int kBlockColumns = 2 * kVector;  // of a block of 16 rows, for one product
    static_assert(kRows % 16 == 0 && kColumns % kBlockColumns == 0);
    static constexpr int kUnits = (kInColumns ? kRows : kColumns) / kVector;  // of a line
    static constexpr int kSize = kRows * kColumns / kVector;                  // Words
    static constexpr int kEach = (kSize + kThreads - 1) / kThreads;           // of a thread
    using Tile =
        std::conditional_t<kWhole && kInColumns, SwizzledColumns<kUnits>, Swizzled<kUnits>>;

    static DOMERGE_DEVICE int row(int unit) {
        return kInColumns ? unit % kUnits * kVector : unit / kUnits;
    }
    static DOMERGE_DEVICE int column(int unit) {
        return kInColumns ? unit / kUnits : unit % kUnits * kVector;
    }

    // Where a warp's part of a tile begins, and its blocks. lane: own_lane().
    using Corner = typename Tile::Corner;
    static DOMERGE_DEVICE Corner corner(const Words* tile, int row, int column) {
        if constexpr (kWhole && kInColumns)
            return Tile::corner(tile, row, column);
        else  // a word as two elements of 16 bits
            return Tile::template corner<kInColumns>(tile, row, kWhole ? 2 * column : column);
    }
    template <class Block>
    static DOMERGE_DEVICE void load(const Corner& corner, int lane, int row, int column,
                                    Block& block) {
        if constexpr (kWhole && kInColumns)
            Tile::load(corner, lane, row, column, block);
        else
            Tile::template load<kInColumns>(corner, lane, row, kWhole ? 2 * column : column, block);
    }

    // Where the vectors come from, in shared memory: one entry a row, or a vector of them in
    // columns.
    static constexpr int kSources = kInColumns ? kRows / kVector : kRows;
    static constexpr int kMostPitch = 1 << 26;
    struct Sources {
        const Storage* at[kSources];  // in column 0
        // From column to column; times 16 and besides, of how many rows, 0 where they are outside;
        // -1 where one copy does not take a vector.
        int step[kSources];
    };

    // Where a copy of no elements may come from: copies want aligned addresses all the same.
    static DOMERGE_DEVICE const Storage* nothing(const Reader<Format>& x) {
        return reinterpret_cast<const Storage*>(x.blocks);
    }

    static DOMERGE_DEVICE void locate(int thread, const Reader<Format>& x, int first,
                                      Sources& sources) {
        for (int i = thread; i < kSources; i += kThreads) {
            const int row = first + (kInColumns ? kVector * i : i);
            const bool inside = row < x.rows;
            const int64_t pitch = inside && kInColumns ? x.block(row).pitch : 1;
            const Storage* const at = inside ? x.element(row, 0) : nothing(x);
            const int count = !inside ? 0 : kInColumns ? least(x.rows - row, kVector) : 1;
            const bool whole = inside && x.is_in_one_block(row) && is_even(at, pitch, kVector);
            sources.at[i] = at;
            sources.step[i] = !inside                       ? 0
                              : whole && pitch < kMostPitch ? static_cast<int>(pitch) * 16 + count
                                                            : -1;
        }
    }

    static DOMERGE_DEVICE bool is_even(const Storage* at, int64_t pitch, int width) {
        return is_aligned(at, width * sizeof(Storage)) && (!kInColumns || pitch % width == 0);
    }

    // Starts the way of a tile, from row `first` and column `c` on, to shared memory.
    static DOMERGE_DEVICE void start(Copies<kThreads>& copies, int thread, Words* to,
                                     const Reader<Format>& x, const Sources& sources, int first,
                                     int c) {
        bool whole = true;
        DOMERGE_UNROLL
        for (int e = 0; e < kEach; ++e) {
            const int unit = thread + e * kThreads, at = c + column(unit);
            if (kSize % kThreads != 0 && unit >= kSize) break;
            const int source = kInColumns ? unit % kUnits : unit / kUnits;
            const int step = sources.step[source];
            whole = whole && step >= 0;
            if (step < 0) continue;
            const int left = step == 0 || at >= x.end ? 0 : kInColumns ? step & 15 : x.end - at;
            const int64_t distance = left == 0 ? 0 : kInColumns ? at * int64_t{step >> 4} : at;
            copies.template start<16>(thread, Tile::at(to, unit / kUnits, unit % kUnits),
                                      sources.at[source] + distance,
                                      static_cast<int>(sizeof(Storage)) * least(left, kVector));
        }
        if (whole) return;
        DOMERGE_ROLLED
        for (int e = 0; e < kEach; ++e) {
            const int unit = thread + e * kThreads;
            if (kSize % kThreads != 0 && unit >= kSize) break;
            if (sources.step[kInColumns ? unit % kUnits : unit / kUnits] < 0)
                start_in_pieces(copies, thread, *Tile::at(to, unit / kUnits, unit % kUnits), x,
                                first + row(unit), c + column(unit));
        }
    }

    // A vector that is not aligned, or of several blocks: word by word, or of 16-bit elements by
    // two copies where its halves allow it, and one by one otherwise; then it is there at once.
    static DOMERGE_DEVICE void start_in_pieces(Copies<kThreads>& copies, int thread, Words& to,
                                               const Reader<Format>& x, int row, int c) {
        constexpr int kPiece = kWhole ? 1 : 4, kBytes = kPiece * sizeof(Storage);
        const int count = c < x.end ? least(kInColumns ? x.rows - row : x.end - c, kVector) : 0;
        if constexpr (!kWhole) {
            bool halves = true;
            DOMERGE_UNROLL
            for (int i = 0; i < kVector; i += kPiece)
                if (i < count) halves = halves && is_half(x, kInColumns ? row + i : row);
            if (!halves) {
                to = x.read(row, c);
                return;
            }
        }
        DOMERGE_UNROLL
        for (int i = 0; i < kVector; i += kPiece) {
            const int some = i < count ? least(count - i, kPiece) : 0;
            const Storage* const from =
                some == 0 ? nothing(x)
                          : (kInColumns ? x.element(row + i, c) : x.element(row, c + i));
            copies.template start<kBytes>(thread, &to.at[i * sizeof(Storage) / 4], from,
                                          static_cast<int>(sizeof(Storage)) * some);
        }
    }

    // Whether one copy takes four elements of 16 bits: of one column, or from a multiple of four on
    // of a row.
    static DOMERGE_DEVICE bool is_half(const Reader<Format>& x, int row) {
        const bool together = !kInColumns || x.owner[row] == x.owner[least(row + 4, x.rows) - 1];
        return together && is_even(x.element(row, 0), x.block(row).pitch, 4);
    }
};

}  // namespace domerge
