// A problem of a descent by tiles: R is too large for one block (descent_steps.h), and a launch
// does one phase of all problems, a block a tile of a matrix.
//
// Matrices [ld, ld] are in scratch memory, R padded to whole tiles; what is beyond R is zero in all
// that a product reads. H, E and F are used at and below the diagonal.
#pragma once

#include "descent_pairs.h"
#include "table.h"

namespace domerge {

constexpr int kTile = 128;
constexpr int kTileThreads = 256;

struct TilesParams {
    const int64_t* work;  // of the launch's problems: see orthogonalize.h
    const int64_t* starts;
    char* memory;
    int64_t each;    // bytes of a problem's memory
    int64_t across;  // tiles in a row of the largest problem
    float* out;
    double* stats;
    bool begins;  // C = I and there is no direction yet
    bool first;   // step: C = I
    bool frobenius;
    double gamma;
    double tol;
};

// What all blocks of a problem know; one block of each step writes it.
struct Whole {
    double running;  // not 0: there is to be another step
    double eta;      // of the last step; 0 where none was taken
    double scale;    // that G is divided by
    double energy_before;
    double moved;  // ||Xhat - X||^2
    Products products;
    Gains gains;
};

// Sums of a tile: Products::find's, then the coefficients of the squared penalty's quartic.
constexpr int kTileSums = kSums + kCoefficients;

// Where the parts of a problem's memory begin, in bytes.
struct Places {
    int64_t sums;      // float64 [kTileSums, tiles]
    int64_t norms;     // float64 [T]: n_j of every factor, 0 if negligible
    int64_t pairs;     // DescentPairs' numbers
    int64_t rows;      // 32-bit [4, ld]: owner, inverse, step, curvature, as in DescentState
    int64_t pulls;     // float32 [2 across, ld]: shares of the curvature of every row
    int64_t matrices;  // float32 [kMatrices, ld, ld]
    int64_t end;
};

constexpr int kMatrices = 8;

DOMERGE_ANYWHERE Places places_of(int64_t across, int64_t adapters, bool frobenius) {
    const int64_t ld = kTile * across, pairs = frobenius ? adapters * (adapters - 1) / 2 : 0;
    Places places{};
    places.sums = (sizeof(Whole) + 15) / 16 * 16;
    places.norms = places.sums + 8 * kTileSums * across * across;
    places.pairs = places.norms + 8 * adapters;
    places.rows = (places.pairs + pairs * (8 * (kCoefficients + 1) + 4) + 127) / 128 * 128;
    places.pulls = places.rows + 4 * 4 * ld;
    places.matrices = places.pulls + 4 * 2 * across * ld;
    places.end = places.matrices + 4 * kMatrices * ld * ld;
    return places;
}

struct TiledState {
    static constexpr int kThreads = kTileThreads;

    struct Shared {
        double partial[kSums][kThreads];
        double group[kSums][kGroups];
        double total[kSums];
    };

    const TilesParams& params;
    Block<kThreads>& block;
    Shared& shared;
    const int64_t* const work;
    const int rank, count;  // R, and factors
    const int across, ld;
    char* const memory;
    const Places places;

    DOMERGE_DEVICE TiledState(const TilesParams& params, Block<kThreads>& block, int64_t problem)
        : params(params),
          block(block),
          shared(*reinterpret_cast<Shared*>(block.shared)),
          work(params.work + 6 * problem),
          rank(static_cast<int>(work[1])),
          count(static_cast<int>(work[2])),
          across((rank + kTile - 1) / kTile),
          ld(across * kTile),
          memory(params.memory + problem * params.each),
          places(places_of(across, count, params.frobenius)) {}

    template <class T>
    DOMERGE_DEVICE T* part(int64_t place) const {
        return reinterpret_cast<T*>(memory + place);
    }
    DOMERGE_DEVICE Whole& whole() const { return *part<Whole>(0); }
    DOMERGE_DEVICE const float* given() const { return reinterpret_cast<const float*>(work[0]); }

    DOMERGE_DEVICE float* matrix(int index) const {
        return part<float>(places.matrices) + int64_t{index} * ld * ld;
    }
    DOMERGE_DEVICE float* c() const { return matrix(0); }
    DOMERGE_DEVICE float* gram() const { return matrix(1); }
    DOMERGE_DEVICE float* h() const { return matrix(2); }
    DOMERGE_DEVICE float* pg() const { return matrix(3); }  // P G
    DOMERGE_DEVICE float* d() const { return matrix(4); }
    DOMERGE_DEVICE float* q() const { return matrix(5); }  // D G
    // M = V o H, and E from the time P is known until the step is taken. On the diagonal Y = Q C^T
    // is in place of E = Y + Y^T.
    DOMERGE_DEVICE float* m() const { return matrix(6); }
    DOMERGE_DEVICE float* e() const { return m(); }
    // P, and F from the time D is known until the step is taken.
    DOMERGE_DEVICE float* p() const { return matrix(7); }
    DOMERGE_DEVICE float* f() const { return p(); }

    // Sum k of every tile.
    DOMERGE_DEVICE double* sums(int k) const {
        return part<double>(places.sums) + k * (across * across);
    }
    DOMERGE_DEVICE float* pulls(int half) const {
        return part<float>(places.pulls) + int64_t{half} * ld;
    }

    // What pairs of factors want.
    DOMERGE_DEVICE double& norm(int j) const { return part<double>(places.norms)[j]; }
    DOMERGE_DEVICE int first_row(int j) const {
        return static_cast<int>(params.starts[work[3] + j]);
    }
    DOMERGE_DEVICE int& owner(int i) const { return part<int>(places.rows)[i]; }
    DOMERGE_DEVICE float& inverse(int i) const { return part<float>(places.rows)[ld + i]; }
    DOMERGE_DEVICE float& step(int i) const { return part<float>(places.rows)[2 * ld + i]; }
    DOMERGE_DEVICE float& curvature(int i) const { return part<float>(places.rows)[3 * ld + i]; }
    DOMERGE_DEVICE double* pair_numbers() const { return part<double>(places.pairs); }
    DOMERGE_DEVICE int pair_room() const { return count * (count - 1) / 2; }

    // Entries of H, E and F below the diagonal; E and F are none before there is a direction.
    struct Entry {
        float x, y, z;
    };
    struct Entries {
        const TiledState& s;
        DOMERGE_DEVICE Entry operator()(int row, int column) const {
            const int64_t at = int64_t{row} * s.ld + column,
                          mirrored = int64_t{column} * s.ld + row;
            if (s.params.begins) return {s.h()[at], 0.0f, 0.0f};
            const float y = s.e()[at];
            const bool diagonal = row / kTile == column / kTile;
            return {s.h()[at], diagonal ? y + s.e()[mirrored] : y, s.f()[at]};
        }
    };
    DOMERGE_DEVICE Entries entries() const { return {*this}; }

    // What a product sums over: R, in whole panels of a multiple of 32.
    DOMERGE_DEVICE int depth() const { return (rank + 31) / 32 * 32; }

    template <class Phase>
    DOMERGE_DEVICE void each(Phase phase) const {
        block.each([&](int thread) { phase(opaque(thread)); });
    }
    template <int kCount, class Part>
    DOMERGE_DEVICE Totals<kCount> total(Part part) const {
        return add_up<kCount, kThreads>(shared, [&](auto phase) { each(phase); }, part);
    }

    // The sums from `first` on of all tiles, or of those at and below the diagonal.
    template <int kCount>
    DOMERGE_DEVICE Totals<kCount> of_tiles(int first, bool lower) const {
        return total<kCount>([&](int thread, double (&found)[kCount]) {
            DOMERGE_ROLLED
            for (int tile = thread; tile < across * across; tile += kThreads) {
                if (lower && tile % across > tile / across) continue;
                DOMERGE_UNROLL
                for (int k = 0; k < kCount; ++k) found[k] += sums(first + k)[tile];
            }
        });
    }

    // One of the problem's statistics.
    DOMERGE_DEVICE void note(int place, double value) const {
        params.stats[5 * work[5] + place] = value;
    }
};

// A block's tile of its problem.
struct TileOf : TiledState {
    const int tile, down;  // its number in the problem, and the row of tiles that it is in
    const int row, column;

    DOMERGE_DEVICE TileOf(const TilesParams& params, Block<kThreads>& block)
        : TiledState(params, block, block.index / (params.across * params.across)),
          tile(static_cast<int>(block.index % (params.across * params.across))),
          down(tile / across),
          row(down * kTile),
          column((tile - down * across) * kTile) {}

    // Smaller problems have fewer tiles than blocks.
    DOMERGE_DEVICE bool exists() const { return down < across; }

    DOMERGE_DEVICE int64_t place(int i, int j) const { return int64_t{row + i} * ld + column + j; }
    DOMERGE_DEVICE int64_t mirrored(int i, int j) const {
        return int64_t{column + j} * ld + row + i;
    }
    DOMERGE_DEVICE bool lower() const { return column <= row; }

    // Calls visit(i, j) for this thread's share of the tile's 4 x 4 blocks at and below the
    // diagonal of the matrix: a warp has 16 rows and 32 columns at a time.
    template <class Visit>
    DOMERGE_DEVICE void for_blocks(int thread, Visit visit) const {
        DOMERGE_ROLLED
        for (int k = thread; k < kTile * kTile / 16; k += kThreads) {
            const int some = k / 32, lane = k % 32;
            const int i = some / 4 * 16 + lane / 8 * 4, j = some % 4 * 32 + lane % 8 * 4;
            if (column + j <= row + i) visit(i, j);
        }
    }

    // C - I of two or four entries.
    template <int kWidth>
    DOMERGE_DEVICE Vec<kWidth> change(Vec<kWidth> c, int i, int j) const {
        DOMERGE_UNROLL
        for (int k = 0; k < kWidth; ++k)
            if (row + i == column + j + k && row + i < rank) c.at[k] -= 1.0f;
        return c;
    }

    // Keeps the tile's sums, from `first` on, of what add(thread, sums) adds up.
    template <int kCount, class Add>
    DOMERGE_DEVICE void keep(int first, Add add) const {
        total<kCount>([&](int thread, double (&found)[kCount]) {
            Part sums{};
            add(thread, sums);
            DOMERGE_UNROLL
            for (int k = 0; k < kCount; ++k) found[k] = sums.at[k];
        });
        each([&](int thread) {
            if (thread < kCount) sums(first + thread)[tile] = shared.total[thread];
        });
    }
};

}  // namespace domerge
