// The phases of a descent that make matrices: a block makes a tile of each. What tiles sum is kept
// tile by tile and added in their order by those who need it.
//
// With Q = D G and K the curvatures of all rows, a step is
//     Gradient  P = K^-1 (M C + 2 gamma (C - I))
//     Metric    P G, and the products of K P with P, the last P, D and C - I
//     Turn      D = -P + beta D, Q = -P G + beta Q
//     Changes   E = Q C^T + C Q^T and F = Q D^T at and below the diagonal, and the squared
//     penalty's
//               quartic; for the Frobenius penalty Quartics, those of all pairs
//     Search    eta (tiles_scalars.h)
//     Advance   C += eta D, H += eta E + eta^2 F, and M = V o H
// 7 R^3 flops, and 3 R^3 the first, in which C = I. A problem that has stopped is left at once.
#pragma once

#include "tiles_product.h"

namespace domerge {

constexpr int64_t kForSums = sizeof(TiledState::Shared);

template <int kBlocks, int64_t kBytes>
struct OnTiles {
    using Params = TilesParams;
    static constexpr int kThreads = kTileThreads;
    static constexpr int kBlocksPerSm = kBlocks;
    static constexpr int64_t kSharedBytes = kBytes;
};

// G and H = G / scale, C = I.
struct Fill : OnTiles<2, 0> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists()) return;
        const double scale = s.whole().scale;
        s.each([&](int thread) {
            const float* const g = global(s.given());
            for_quads<kTile, kThreads>(thread, [&](int i, int j) {
                const int64_t place = s.place(i, j);
                const int row = s.row + i, column = s.column + j;
                Vec<4> scaled, identity;
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const bool inside = row < s.rank && column + c < s.rank;
                    const int64_t from = int64_t{row} * s.rank + column + c;
                    scaled.at[c] = inside ? static_cast<float>(g[from] / scale) : 0.0f;
                    identity.at[c] = inside && row == column + c ? 1.0f : 0.0f;
                }
                store(s.gram() + place, scaled);
                store(s.h() + place, scaled);
                store(s.c() + place, identity);
            });
        });
    }
};

// Adds an entry of H below the diagonal that counts to the sums of ||H_ij||^2 and of
// ||H_ij||^2 / (n_i n_j).
DOMERGE_DEVICE void add_energy(const TileOf& s, Part& sums, int row, int column, float h) {
    sums.at[0] += h * h;
    sums.at[1] += s.inverse(row) * s.inverse(column) * (h * h);
}

// M at C = I, what each of its columns adds to the curvature of a row, and the energies.
struct Weigh : OnTiles<2, kForSums> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists()) return;
        const DescentPairs<const TileOf> pairs(s);
        s.keep<kSums>(0, [&](int thread, Part& sums) {
            const float* const weights = pairs.weights();
            const int half = thread / kTile, j = thread % kTile, column = s.column + j;
            float pull = 0;
            DOMERGE_ROLLED
            for (int k = 0; k < kTile / 2; ++k) {
                const int i = half * (kTile / 2) + k, row = s.row + i;
                const int64_t place = s.place(i, j);
                const float h = s.h()[place];
                float m = 0;
                if (pairs.crosses(row, column)) {
                    m = h * (row > column ? pairs.weight(weights, row, column)
                                          : pairs.weight(weights, column, row));
                    if (row > column) add_energy(s, sums, row, column, h);
                }
                s.m()[place] = m;
                pull += m * s.gram()[place];
            }
            s.pulls(2 * s.down + half)[column] = pull;
        });
    }
};

struct Gradient : OnTiles<1, TileProduct::kSharedBytes> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists() || s.whole().running == 0) return;
        TileProduct product(block);
        product.clear();
        if (!params.first)
            product.add<false>(s.m() + s.row, s.c() + s.column, s.ld, s.depth(), kTile);
        s.each([&](int thread) {
            const float pull = static_cast<float>(2 * params.gamma);
            product.for_pairs(thread, kTile, [&](int i, int j, Vec<2> p) {
                const int64_t place = s.place(i, j);
                if (params.first) p = load<2>(s.m() + place);
                const Vec<2> change = s.change(load<2>(s.c() + place), i, j);
                const float step = s.step(s.row + i);
                DOMERGE_UNROLL
                for (int c = 0; c < 2; ++c) p.at[c] = (p.at[c] + change.at[c] * pull) * step;
                store(s.p() + place, p);
            });
        });
    }
};

struct Metric : OnTiles<1, TileProduct::kSharedBytes> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists() || s.whole().running == 0) return;
        TileProduct product(block);
        product.clear();
        product.add<true>(s.p() + s.place(0, -s.column), s.gram() + int64_t{s.column} * s.ld, s.ld,
                          s.depth(), kTile);
        s.keep<kSums>(0, [&](int thread, Part& sums) {
            product.for_pairs(thread, kTile, [&](int i, int j, Vec<2> q) {
                const int64_t place = s.place(i, j);
                const Vec<2> p = load<2>(s.p() + place),
                             change = s.change(load<2>(s.c() + place), i, j);
                Vec<2> last{}, d{};
                if (!params.first) {
                    last = load<2>(s.pg() + place);
                    d = load<2>(s.d() + place);
                }
                const float k = s.curvature(s.row + i);
                DOMERGE_UNROLL
                for (int c = 0; c < 2; ++c)
                    add_gradient(sums, k, p.at[c], q.at[c], p.at[c], last.at[c], d.at[c],
                                 change.at[c]);
                store(s.pg() + place, q);
            });
        });
    }
};

struct Turn : OnTiles<4, kForSums> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists() || s.whole().running == 0) return;
        Products products{};
        products.find(s.of_tiles<kSums>(0, false));
        const float beta = static_cast<float>(products.beta(s.whole().products.kpp));
        s.each([&](int thread) {
            for_quads<kTile, kThreads>(thread, [&](int i, int j) {
                const int64_t place = s.place(i, j);
                const Vec<4> p = load(s.p() + place), pg = load(s.pg() + place);
                Vec<4> d{}, q{};
                if (!params.first) {
                    d = load(s.d() + place);
                    q = load(s.q() + place);
                }
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    d.at[c] = d.at[c] * beta - p.at[c];
                    q.at[c] = q.at[c] * beta - pg.at[c];
                }
                store(s.d() + place, d);
                store(s.q() + place, q);
            });
        });
    }
};

struct Changes : OnTiles<1, TileProduct::kSharedBytes> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists() || !s.lower() || s.whole().running == 0) return;
        const bool diagonal = s.row == s.column;
        const int64_t down = int64_t{s.row} * s.ld, across = int64_t{s.column} * s.ld;
        TileProduct product(block);
        product.clear();
        // 0: Q C^T; 1: C Q^T, which on the diagonal is the same but for its place; 2: Q D^T.
        DOMERGE_ROLLED
        for (int k = 0; k < 3; ++k) {
            const bool is_e = k < 2, skipped = is_e && (params.first || (k == 1 && diagonal));
            const int limit = diagonal && !is_e ? 0 : kTile;
            if (!skipped)
                product.add<true>((k == 1 ? s.c() : s.q()) + down,
                                  (k == 0   ? s.c()
                                   : k == 1 ? s.q()
                                            : s.d()) +
                                      across,
                                  s.ld, s.depth(), limit);
            if (k != 1) continue;
            s.each([&](int thread) {
                product.for_pairs(thread, kTile, [&](int i, int j, Vec<2> e) {
                    const int64_t place = s.place(i, j);
                    if (params.first) {
                        e = load<2>(s.q() + place);
                        const float* const mirrored = s.q() + s.mirrored(i, j);
                        if (!diagonal) e = {{e.at[0] + mirrored[0], e.at[1] + mirrored[s.ld]}};
                    }
                    store(s.e() + place, e);
                });
            });
            product.clear();
        }
        s.keep<kCoefficients>(kSums, [&](int thread, Part& sums) {
            product.for_pairs(thread, diagonal ? 0 : kTile, [&](int i, int j, Vec<2> f) {
                const int64_t place = s.place(i, j);
                const Vec<2> x = load<2>(s.h() + place);
                Vec<2> e = load<2>(s.e() + place);
                if (diagonal) {
                    const float* const mirrored = s.e() + s.mirrored(i, j);
                    e = {{e.at[0] + mirrored[0], e.at[1] + mirrored[s.ld]}};
                }
                const int row = s.row + i, column = s.column + j;
                DOMERGE_UNROLL
                for (int c = 0; c < 2; ++c) {
                    const bool counts = row > column + c && s.owner(row) != s.owner(column + c);
                    const float w = counts ? s.inverse(row) * s.inverse(column + c) : 0.0f;
                    add_quartic(sums.at, x.at[c], e.at[c], f.at[c], w);
                }
                store(s.f() + place, f);
            });
        });
    }
};

// The quartics of pairs, each block those of some.
struct Quartics : OnTiles<2, kForSums> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists() || s.whole().running == 0) return;
        DescentPairs<const TileOf>(s).find_quartics(s.tile, s.across * s.across);
    }
};

struct Advance : OnTiles<2, 0> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        const double step = s.exists() ? s.whole().eta : 0.0;
        if (!(step > 0)) return;
        const float eta = static_cast<float>(step), square = static_cast<float>(step * step);
        const bool diagonal = s.row == s.column;
        const DescentPairs<const TileOf> pairs(s);
        s.each([&](int thread) {
            for_quads<kTile, kThreads>(thread, [&](int i, int j) {
                const int64_t place = s.place(i, j);
                const Vec<4> d = load(s.d() + place);
                Vec<4> c = load(s.c() + place);
                DOMERGE_UNROLL
                for (int k = 0; k < 4; ++k) c.at[k] += d.at[k] * eta;
                store(s.c() + place, c);
            });
        });
        if (!s.lower()) return;
        s.each([&](int thread) {
            s.for_blocks(thread, [&](int i, int j) {
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int64_t place = s.place(i + r, j);
                    const Vec<4> f = load(s.f() + place);
                    Vec<4> e = load(s.e() + place), h = load(s.h() + place);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        if (diagonal) e.at[c] += s.e()[s.mirrored(i + r, j + c)];
                        h.at[c] += e.at[c] * eta + f.at[c] * square;
                    }
                    store(s.h() + place, h);
                }
            });
        });
        s.each([&](int thread) {  // M is in E's place
            const float* const weights = pairs.weights();
            s.for_blocks(thread, [&](int i, int j) {
                const int64_t place = s.place(i, j);
                pairs.weigh(s.h() + place, s.m() + place, s.m() + s.mirrored(i, j), s.ld, s.row + i,
                            s.column + j, weights);
            });
        });
    }
};

// C into the results, and the energies that are left.
struct Leave : OnTiles<2, kForSums> {
    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const TileOf s(params, block);
        if (!s.exists()) return;
        const DescentPairs<const TileOf> pairs(s);
        s.keep<2>(0, [&](int thread, Part& sums) {
            float* const out = global(params.out + s.work[4]);
            DOMERGE_ROLLED
            for (int k = thread; k < kTile * kTile; k += kThreads) {
                const int i = k / kTile, j = k % kTile, row = s.row + i, column = s.column + j;
                if (row >= s.rank || column >= s.rank) continue;
                const int64_t place = s.place(i, j);
                out[int64_t{row} * s.rank + column] = s.c()[place];
                if (row > column && pairs.crosses(row, column))
                    add_energy(s, sums, row, column, s.h()[place]);
            }
        });
    }
};

}  // namespace domerge
