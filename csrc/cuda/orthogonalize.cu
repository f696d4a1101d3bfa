// The descent on R x R matrices, one problem at a time for each thread block, all its steps within
// one launch.
//
// Stored transposed so that every product reads whole rows of both sides, sum_k L[k][i] R[k][j]:
// with Ct = C^T, M = V o H and Q = D G,  Pt = (Ct M + 2 gamma (Ct - I)) K^-1,  Qt = G Dt,
// Y = Qt^T Ct,  E = Y + Y^T,  F = Qt^T Dt, where K are the curvatures of all rows. H, E and F are
// used below the diagonal blocks only; F is made whole, since idle threads would save nothing.
//
// A step: 8 R^3 flops in four products, and 34 reads or writes of a matrix (136 R^2 bytes). As many
// matrices as fit stay in shared memory. The others are scratch memory of a block that stays and
// takes one problem after the other: little enough to be found in the L2 cache up to size 128, and
// not beyond.
#include "orthogonalize.h"

#include <algorithm>

#include "../common/descent.h"
#include "line_search.h"
#include "table.h"

namespace domerge {
namespace {

constexpr int kPanel = 8;  // rows of an operand that are staged at a time
constexpr int kMatrices = 8;
constexpr int kCoefficients = 5;  // of a quartic
constexpr int kSums = 6;          // as many are added up at once
constexpr int kGroups = 16;       // of threads, whose sums are added first

// A grid of threads makes a product, each a tile of rows x columns of it.
struct Shape {
    int grid_rows, grid_columns, rows, columns, blocks_per_sm;
};

constexpr Shape shape(int size) {
    switch (size) {
        case 16:
            return {4, 8, 4, 2, 12};
        case 32:
            return {8, 8, 4, 4, 4};
        case 64:
            return {16, 16, 4, 4, 1};
        case 96:
            return {16, 16, 6, 6, 1};
        case 128:
            return {16, 16, 8, 8, 1};
        case 192:
            return {16, 16, 6, 12, 1};  // half of the rows at a time
        default:
            return {16, 16, 4, 16, 1};  // 256: a quarter of the rows at a time
    }
}

template <int kWidth>
struct alignas(4 * kWidth) Vec {
    float at[kWidth];
};

template <int kWidth = 4>
DOMERGE_DEVICE Vec<kWidth> load(const float* from) {
    return *reinterpret_cast<const Vec<kWidth>*>(from);
}

template <int kWidth>
DOMERGE_DEVICE void store(float* to, const Vec<kWidth>& values) {
    *reinterpret_cast<Vec<kWidth>*>(to) = values;
}

// Tiles are made of vectors, so that neighbouring threads read neighbouring vectors.
constexpr int vector_width(int length) {
    return length % 4 == 0 ? 4 : 2;
}

template <int kRows, int kColumns>
struct Tile {
    static constexpr int kRowWidth = vector_width(kRows);
    static constexpr int kColumnWidth = vector_width(kColumns);
    float at[kRows][kColumns];

    // Adds sum_k left[k][i] right[k][j] over kPanel rows. The strides are those of this thread's
    // vectors; left and right point at its first.
    DOMERGE_DEVICE void add_product(const float* left, int left_ld, int left_stride,
                                    const float* right, int right_ld, int right_stride) {
        DOMERGE_UNROLL
        for (int k = 0; k < kPanel; ++k) {
            Vec<kRowWidth> a[kRows / kRowWidth];
            Vec<kColumnWidth> b[kColumns / kColumnWidth];
            DOMERGE_UNROLL
            for (int u = 0; u < kRows / kRowWidth; ++u)
                a[u] = load<kRowWidth>(left + k * left_ld + u * left_stride);
            DOMERGE_UNROLL
            for (int v = 0; v < kColumns / kColumnWidth; ++v)
                b[v] = load<kColumnWidth>(right + k * right_ld + v * right_stride);
            DOMERGE_UNROLL
            for (int i = 0; i < kRows; ++i) {
                DOMERGE_UNROLL
                for (int j = 0; j < kColumns; ++j)
                    at[i][j] += a[i / kRowWidth].at[i % kRowWidth] *
                                b[j / kColumnWidth].at[j % kColumnWidth];
            }
        }
    }
};

// One side of a product: [size, size + 4], its rows or its columns as the rows of panels.
struct Operand {
    const float* at;
    bool transposed;
};

// For the Frobenius penalty: pair p = j (j - 1) / 2 + i of the factors i < j. ||H_ij(eta)||_F^2 is
// a quartic in eta.
struct Pairs {
    int64_t count;
    double* quartic;  // coefficient k of pair p at k * kMaxPairs + p
    double* floor;    // EPS n_i n_j, 0 where a factor is negligible
    float* v;         // V_ij
};

// <A, B>_G = tr(A G B^T), kept up to date instead of being computed anew.
struct Products {
    double kpp, kp_old_p, kp_d;  // of the gradient K P with P, the last P, and D
    double pp, p_d, p_change;    // of P with P, D, and C - I
    double dd, d_change;         // of D with D and with C - I
};

struct Stats {
    double steps, objective_before, objective_after, cross_left, change;
};

struct DescentParams {
    const int64_t* work;
    const int64_t* starts;
    float* out;
    double* stats;
    char* scratch;
    int64_t problems;
    int64_t blocks;
    int resident;  // matrices in shared memory
    bool frobenius;
    double gamma;
    int64_t steps;
    double tol;
};

// R is padded to kSize. What is beyond R is zero in every matrix, so that it changes no sum.
template <int kSize>
struct Descent {
    using Params = DescentParams;
    static constexpr Shape kShape = shape(kSize);
    static constexpr int kThreads = kShape.grid_rows * kShape.grid_columns;
    static constexpr int kBlocksPerSm = kShape.blocks_per_sm;
    static constexpr int kRegion = kShape.grid_rows * kShape.rows;  // rows that are made at a time
    static constexpr int kLd = kSize + 4;                           // away from bank conflicts
    static constexpr int64_t kMatrixBytes = int64_t{4} * kSize * kLd;
    static constexpr int64_t kMaxPairs = int64_t{kSize} * (kSize - 1) / 2;
    static constexpr int64_t kPairsBytes = kMaxPairs * (8 * (kCoefficients + 1) + 4);
    static_assert(kShape.grid_columns * kShape.columns == kSize && kSize % kRegion == 0);

    struct Panels {
        float left[2][kPanel * kRegion];
        float right[2][kPanel * kSize];
    };
    struct Shared {
        union {
            Panels panels;
            double partial[kSums][kThreads];
        };
        double group[kSums][kGroups];
        double total[kSums];
        double norm[kSize];                  // n_j of every factor, 0 if negligible
        float inverse[kSize];                // 1 / n of every row's factor, 0 if negligible
        alignas(16) float curvature[kSize];  // K of every row, and
        alignas(16) float step[kSize];       // its inverse, 0 of one that stays
        int owner[kSize];                    // the factor of every row, -1 beyond R
        int start[kSize + 1];
    };
    static constexpr int64_t kOwnBytes = (sizeof(Shared) + 15) / 16 * 16;  // matrices follow
    static_assert(kOwnBytes <= kSmallestShared);
    using OneTile = Tile<kShape.rows, kShape.columns>;

    static int resident(int64_t shared_bytes) {
        const int64_t room = (shared_bytes - kOwnBytes) / kMatrixBytes;
        return static_cast<int>(room < kMatrices ? room : kMatrices);
    }
    static int64_t shared_bytes(int resident) { return kOwnBytes + resident * kMatrixBytes; }
    static DOMERGE_DEVICE int64_t scratch_bytes(int resident, bool frobenius) {
        const int64_t pairs_bytes = frobenius ? kPairsBytes : 0;
        return ((kMatrices - resident) * kMatrixBytes + pairs_bytes + 127) / 128 * 128;
    }

    template <int kCount>
    struct Totals {
        double at[kCount];
    };

    const Params& params;
    Block<kThreads>& block;
    Shared& shared;
    int rank, count;
    double scale;
    Pairs pairs;
    // The busiest first: they get the shared memory. Three of them are used twice in a step.
    float* e;  // M, then G Pt, then Y and E
    float* ct;
    float* pt;  // Pt, then F
    float* dt;
    float* qt;
    float* h;
    float* pt_old;
    float* gram;

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        for (int64_t i = block.index; i < params.problems; i += params.blocks) {
            const int64_t* work = params.work + 6 * i;
            Descent descent(params, block, work);
            descent.begin(global(reinterpret_cast<const float*>(work[0])), params.starts + work[3]);
            const Stats stats = descent.descend();
            descent.finish(params.out + work[4], params.stats + 5 * work[5], stats);
        }
    }

    DOMERGE_DEVICE Descent(const Params& params, Block<kThreads>& block, const int64_t* work)
        : params(params),
          block(block),
          shared(*reinterpret_cast<Shared*>(block.shared)),
          rank(static_cast<int>(work[1])),
          count(static_cast<int>(work[2])),
          scale(1.0),
          e(place(0)),
          ct(place(1)),
          pt(place(2)),
          dt(place(3)),
          qt(place(4)),
          h(place(5)),
          pt_old(place(6)),
          gram(place(7)) {
        pairs.count = static_cast<int64_t>(count) * (count - 1) / 2;
        pairs.quartic =
            reinterpret_cast<double*>(own_scratch() + (kMatrices - params.resident) * kMatrixBytes);
        pairs.floor = pairs.quartic + kCoefficients * kMaxPairs;
        pairs.v = reinterpret_cast<float*>(pairs.floor + kMaxPairs);
    }

    DOMERGE_DEVICE char* own_scratch() const {
        return params.scratch + block.index * scratch_bytes(params.resident, params.frobenius);
    }

    DOMERGE_DEVICE float* place(int index) const {
        char* const at = index < params.resident
                             ? block.shared + kOwnBytes + index * kMatrixBytes
                             : own_scratch() + (index - params.resident) * kMatrixBytes;
        return reinterpret_cast<float*>(at);
    }

    // A phase of many: the addresses that it uses should not fill the registers of the others.
    template <class Phase>
    DOMERGE_DEVICE void each(Phase phase) {
        block.each([&](int thread) { phase(opaque(thread)); });
    }

    // Calls visit(row, column) for this thread's share of all rows of four.
    template <class Visit>
    static DOMERGE_DEVICE void for_quads(int thread, Visit visit) {
        DOMERGE_ROLLED
        for (int i = thread; i < kSize * kSize / 4; i += kThreads)
            visit(i / (kSize / 4), i % (kSize / 4) * 4);
    }

    // Calls visit(row, column) for this thread's share of the 4 x 4 blocks on and below the
    // diagonal. Two rows of blocks, one from each end, have as many as any other two.
    template <class Visit>
    static DOMERGE_DEVICE void for_lower(int thread, Visit visit) {
        constexpr int blocks = kSize / 4;
        DOMERGE_ROLLED
        for (int i = thread; i < blocks / 2 * (blocks + 1); i += kThreads) {
            const int row = i / (blocks + 1), column = i % (blocks + 1);
            if (column < blocks - row)
                visit(4 * (blocks - 1 - row), 4 * column);
            else
                visit(4 * row, 4 * (column - (blocks - row)));
        }
    }

    // Sums of what part(thread, sums) adds up, in an order that is always the same.
    template <int kCount, class Part>
    DOMERGE_DEVICE Totals<kCount> total(Part part) {
        each([&](int thread) {
            double sums[kCount] = {};
            part(thread, sums);
            DOMERGE_UNROLL
            for (int k = 0; k < kCount; ++k) shared.partial[k][thread] = sums[k];
        });
        each([&](int thread) {
            constexpr int length = kThreads / kGroups;
            for (int i = thread; i < kCount * kGroups; i += kThreads) {
                const double* partial = &shared.partial[i / kGroups][i % kGroups * length];
                double sum = 0;
                for (int l = 0; l < length; ++l) sum += partial[l];
                shared.group[i / kGroups][i % kGroups] = sum;
            }
        });
        each([&](int thread) {
            if (thread >= kCount) return;
            double sum = 0;
            for (int g = 0; g < kGroups; ++g) sum += shared.group[thread][g];
            shared.total[thread] = sum;
        });
        Totals<kCount> totals;
        DOMERGE_UNROLL
        for (int k = 0; k < kCount; ++k) totals.at[k] = shared.total[k];
        return totals;
    }

    // This thread's share of kPanel rows of an operand, on its way to a panel of kWidth columns.
    template <int kWidth>
    struct Share {
        static constexpr int kQuads = kPanel * kWidth / 4;
        static constexpr int kEach = (kQuads + kThreads - 1) / kThreads;
        Vec<4> quads[kEach];

        DOMERGE_DEVICE void fetch(int thread, Operand operand, int k, int column) {
            DOMERGE_UNROLL
            for (int n = 0; n < kEach; ++n) {
                const int i = thread + n * kThreads;
                if (kQuads % kThreads != 0 && i >= kQuads) continue;
                const int along = (k + i / (kWidth / 4)) * kLd + column + i % (kWidth / 4) * 4;
                const int across = (column + i % kWidth) * kLd + k + i / kWidth * 4;
                quads[n] = load(operand.at + (operand.transposed ? across : along));
            }
        }

        DOMERGE_DEVICE void keep(int thread, Operand operand, float* panel) const {
            DOMERGE_UNROLL
            for (int n = 0; n < kEach; ++n) {
                const int i = thread + n * kThreads;
                if (kQuads % kThreads != 0 && i >= kQuads) continue;
                if (operand.transposed) {
                    float* column = panel + i / kWidth * 4 * kWidth + i % kWidth;
                    DOMERGE_UNROLL
                    for (int s = 0; s < 4; ++s) column[s * kWidth] = quads[n].at[s];
                } else {
                    store(panel + 4 * i, quads[n]);
                }
            }
        }
    };

    // out = sum_k left[k][row] right[k][column], or for the gradient that, plus 2 gamma (Ct - I),
    // times K^-1. Operands go through panels in
    // shared memory; the next is fetched while one is used.
    DOMERGE_DEVICE void multiply(Operand left, Operand right, float* out, bool gradient) {
        const int depth = (rank + kPanel - 1) / kPanel * kPanel;
        Panels& panels = shared.panels;
        for (int begin = 0; begin < kSize; begin += kRegion) {
            PerThread<OneTile, kThreads> tiles;
            const auto stage = [&](int thread, int k, auto meanwhile) {
                Share<kRegion> from_left;
                Share<kSize> from_right;
                if (k < depth) from_left.fetch(thread, left, k, begin);
                if (k < depth) from_right.fetch(thread, right, k, 0);
                meanwhile();
                if (k < depth) from_left.keep(thread, left, panels.left[k / kPanel % 2]);
                if (k < depth) from_right.keep(thread, right, panels.right[k / kPanel % 2]);
            };
            each([&](int thread) { stage(thread, 0, [&] { tiles[thread] = OneTile{}; }); });
            for (int k = 0; k < depth; k += kPanel) {
                each([&](int thread) {
                    stage(thread, k + kPanel, [&] { add_panel(tiles[thread], thread, k); });
                });
            }
            each([&](int thread) { write_out(tiles[thread], thread, begin, out, gradient); });
        }
    }

    static DOMERGE_DEVICE int grid_row(int thread) {  // a warp is 4 x 8 threads
        return thread / 32 / (kShape.grid_columns / 8) * 4 + thread % 32 / 8;
    }
    static DOMERGE_DEVICE int grid_column(int thread) {
        return thread / 32 % (kShape.grid_columns / 8) * 8 + thread % 8;
    }

    DOMERGE_DEVICE void add_panel(OneTile& tile, int thread, int k) const {
        const int buffer = k / kPanel % 2;
        tile.add_product(shared.panels.left[buffer] + grid_row(thread) * OneTile::kRowWidth,
                         kRegion, kShape.grid_rows * OneTile::kRowWidth,
                         shared.panels.right[buffer] + grid_column(thread) * OneTile::kColumnWidth,
                         kSize, kShape.grid_columns * OneTile::kColumnWidth);
    }

    DOMERGE_DEVICE void write_out(const OneTile& tile, int thread, int begin, float* out,
                                  bool gradient) const {
        constexpr int height = OneTile::kRowWidth, width = OneTile::kColumnWidth;
        DOMERGE_UNROLL
        for (int i = 0; i < kShape.rows; ++i) {
            const int row =
                begin + (i / height * kShape.grid_rows + grid_row(thread)) * height + i % height;
            DOMERGE_UNROLL
            for (int v = 0; v < kShape.columns / width; ++v) {
                const int column = (v * kShape.grid_columns + grid_column(thread)) * width;
                Vec<width> values;
                DOMERGE_UNROLL
                for (int j = 0; j < width; ++j) values.at[j] = tile.at[i][v * width + j];
                if (gradient) {
                    const float pull = static_cast<float>(2 * params.gamma);
                    const Vec<width> change = change_at<width>(row, column),
                                     steps = load<width>(shared.step + column);
                    DOMERGE_UNROLL
                    for (int j = 0; j < width; ++j)
                        values.at[j] = (values.at[j] + change.at[j] * pull) * steps.at[j];
                }
                store(out + row * kLd + column, values);
            }
        }
    }

    // Ct = I, H = G / scale, D = Q = P = E = F = 0 and the factors' norms.
    DOMERGE_DEVICE void begin(const float* g, const int64_t* starts) {
        const double trace = total<1>([&](int thread, double (&sums)[1]) {
                                 for (int i = thread; i < rank; i += kThreads)
                                     sums[0] += g[static_cast<int64_t>(i) * rank + i];
                             }).at[0];
        scale = trace > 0 ? trace / rank : 1.0;
        each([&](int thread) {
            for_quads(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                Vec<4> scaled, identity;
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const bool inside = row < rank && column + c < rank;
                    scaled.at[c] =
                        inside ? static_cast<float>(g[row * rank + column + c] / scale) : 0.0f;
                    identity.at[c] = inside && row == column + c ? 1.0f : 0.0f;
                }
                store(gram + at, scaled);
                store(h + at, scaled);
                store(ct + at, identity);
                for (float* zero : {e, pt, dt, qt, pt_old}) store(zero + at, Vec<4>{});
            });
            for (int i = thread; i < kSize; i += kThreads) {
                shared.owner[i] = -1;
                shared.inverse[i] = 0.0f;
            }
            for (int j = thread; j <= count; j += kThreads)
                shared.start[j] = static_cast<int>(starts[j]);
        });
        find_norms();
        if (params.frobenius) find_floors();
    }

    DOMERGE_DEVICE void find_norms() {
        PerThread<double, kThreads> largest;
        each([&](int thread) {
            for (int j = thread; j < count; j += kThreads) {
                double trace = 0;
                for (int i = shared.start[j]; i < shared.start[j + 1]; ++i) {
                    trace += gram[i * kLd + i];
                    shared.owner[i] = j;
                }
                shared.norm[j] = trace > 0 ? sqrt(trace) : 0.0;
            }
        });
        each([&](int thread) {
            largest[thread] = 0;
            for (int j = 0; j < count; ++j)
                if (shared.norm[j] > largest[thread]) largest[thread] = shared.norm[j];
        });
        each([&](int thread) {
            for (int j = thread; j < count; j += kThreads) {
                const double norm = shared.norm[j];
                if (norm <= kNegligible * largest[thread]) {
                    shared.norm[j] = 0;
                    continue;
                }
                for (int i = shared.start[j]; i < shared.start[j + 1]; ++i)
                    shared.inverse[i] = static_cast<float>(1 / norm);
            }
        });
    }

    // Calls visit(p, i, j) for this thread's share of the pairs i < j.
    template <class Visit>
    DOMERGE_DEVICE void for_pairs(int thread, Visit visit) const {
        for (int64_t p = thread; p < pairs.count; p += kThreads) visit(p);
    }

    DOMERGE_DEVICE static int later_of(int64_t p) {
        int j = static_cast<int>((1 + sqrtf(static_cast<float>(1 + 8 * p))) / 2);
        while (pair(0, j) > p) --j;
        while (pair(0, j + 1) <= p) ++j;
        return j;
    }
    DOMERGE_DEVICE static int64_t pair(int i, int j) {
        return static_cast<int64_t>(j) * (j - 1) / 2 + i;
    }

    DOMERGE_DEVICE void find_floors() {
        each([&](int thread) {
            for_pairs(thread, [&](int64_t p) {
                const int j = later_of(p), i = static_cast<int>(p - pair(0, j));
                pairs.floor[p] = kFrobeniusFloor * shared.norm[i] * shared.norm[j];
            });
        });
    }

    // Whether an entry of H below the diagonal counts: its factors differ and neither is
    // negligible.
    DOMERGE_DEVICE bool crosses(int row, int column) const {
        return shared.owner[row] != shared.owner[column] && shared.inverse[row] > 0 &&
               shared.inverse[column] > 0;
    }

    // V of an entry that counts.
    DOMERGE_DEVICE float weight(int row, int column) const {
        if (params.frobenius) return pairs.v[pair(shared.owner[column], shared.owner[row])];
        return 4 * shared.inverse[row] * shared.inverse[column];
    }

    // sum ||H_ij||^2 over the pairs.
    DOMERGE_DEVICE double cross_energy() {
        return total<1>([&](int thread, double (&sums)[1]) {
                   for_lower(thread, [&](int row, int column) {
                       float sum = 0;
                       DOMERGE_UNROLL
                       for (int r = 0; r < 4; ++r) {
                           const Vec<4> x = load(h + (row + r) * kLd + column);
                           DOMERGE_UNROLL
                           for (int c = 0; c < 4; ++c)
                               if (row + r > column + c && crosses(row + r, column + c))
                                   sum += x.at[c] * x.at[c];
                       }
                       sums[0] += sum;
                   });
               })
            .at[0];
    }

    // M = V o H, both triangles. A 4 x 4 block on the diagonal is within both.
    DOMERGE_DEVICE void weigh() {
        each([&](int thread) {
            for_lower(thread, [&](int row, int column) {
                Vec<4> straight[4], flipped[4];
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const Vec<4> x = load(h + (row + r) * kLd + column);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        const bool used = row + r > column + c && crosses(row + r, column + c);
                        straight[r].at[c] = flipped[c].at[r] =
                            used ? weight(row + r, column + c) * x.at[c] : 0.0f;
                    }
                }
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    if (row == column) {
                        DOMERGE_UNROLL
                        for (int c = 0; c < 4; ++c) straight[r].at[c] += flipped[r].at[c];
                    }
                    store(e + (row + r) * kLd + column, straight[r]);
                    if (row != column) store(e + (column + r) * kLd + row, flipped[r]);
                }
            });
        });
    }

    // The curvatures along the rows of X_i, from M in e: that of the penalty is
    // sum_j V_ij ||G_ij||^2 / n_i^2.
    DOMERGE_DEVICE void find_curvatures() {
        each([&](int thread) {
            for (int i = thread; i < kSize; i += kThreads) {
                float sum = 0;
                for (int k = 0; k < rank; ++k) sum += e[k * kLd + i] * gram[k * kLd + i];
                shared.step[i] = sum;
                shared.curvature[i] = 0.0f;
            }
        });
        each([&](int thread) {
            for (int j = thread; j < count; j += kThreads) {
                double sum = 0;
                for (int i = shared.start[j]; i < shared.start[j + 1]; ++i) sum += shared.step[i];
                const double norm = shared.norm[j];
                if (norm > 0)
                    shared.curvature[shared.start[j]] = static_cast<float>(sum / (norm * norm));
            }
        });
        each([&](int thread) {
            float largest = 0;
            for (int j = 0; j < count; ++j) {
                const float mean = shared.curvature[shared.start[j]];
                if (mean > largest) largest = mean;
            }
            for (int i = thread; i < kSize; i += kThreads) {
                const int owner = shared.owner[i];
                shared.step[i] = 0.0f;
                if (owner < 0) continue;
                const float mean = shared.curvature[shared.start[owner]];
                const double k = bounded_curvature(mean, largest, params.gamma);
                if (k > 0) shared.step[i] = static_cast<float>(1 / k);
            }
        });
        each([&](int thread) {
            for (int i = thread; i < kSize; i += kThreads) {
                const float step = shared.step[i];
                shared.curvature[i] = step > 0 ? 1 / step : 0.0f;
            }
        });
    }

    // Ct - I, exactly: the difference is what the change is measured by.
    template <int kWidth>
    DOMERGE_DEVICE Vec<kWidth> change_at(int row, int column) const {
        Vec<kWidth> c = load<kWidth>(ct + row * kLd + column);
        DOMERGE_UNROLL
        for (int k = 0; k < kWidth; ++k)
            if (row == column + k && row < rank) c.at[k] -= 1.0f;
        return c;
    }

    // The products of a step, by one piece of code: its compilation is what takes time.
    //     0  Pt = (Ct M + 2 gamma (Ct - I)) K^-1
    //     1  G Pt, after which the direction is turned
    //     2  Y = D G C^T
    //     3  F = D G D^T
    // False where the gradient is zero.
    DOMERGE_DEVICE bool find_direction(Products& products, double kpp_old) {
        DOMERGE_ROLLED
        for (int product = 0; product < 4; ++product) {
            const Operand left{product == 0 ? ct : product == 1 ? gram : qt, product == 0};
            const Operand right{product == 0   ? e
                                : product == 1 ? pt
                                : product == 2 ? ct
                                               : dt,
                                false};
            multiply(left, right, product == 1 || product == 2 ? e : pt, product == 0);
            if (product != 1) continue;
            find_gradient_products(products);
            if (!(products.kpp > 0)) return false;
            turn(products, kpp_old);
        }
        return true;
    }

    // The products of P with what is known, from G Pt.
    DOMERGE_DEVICE void find_gradient_products(Products& products) {
        const Totals<kSums> totals = total<kSums>([&](int thread, double (&sums)[kSums]) {
            for_quads(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                const Vec<4> q = load(e + at), p = load(pt + at), old = load(pt_old + at),
                             d = load(dt + at), change = change_at<4>(row, column),
                             k = load(shared.curvature + column);
                float part[kSums] = {};
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    const float kq = k.at[c] * q.at[c];
                    part[0] += kq * p.at[c];
                    part[1] += kq * old.at[c];
                    part[2] += kq * d.at[c];
                    part[3] += q.at[c] * p.at[c];
                    part[4] += q.at[c] * d.at[c];
                    part[5] += q.at[c] * change.at[c];
                }
                DOMERGE_UNROLL
                for (int i = 0; i < kSums; ++i) sums[i] += part[i];
            });
        });
        products.kpp = totals.at[0];
        products.kp_old_p = totals.at[1];
        products.kp_d = totals.at[2];
        products.pp = totals.at[3];
        products.p_d = totals.at[4];
        products.p_change = totals.at[5];
    }

    // D = -P + beta D by Polak and Ribiere, and Q = D G by the same recurrence.
    DOMERGE_DEVICE void turn(Products& products, double kpp_old) {
        double beta = kpp_old > 0 ? (products.kpp - products.kp_old_p) / kpp_old : 0.0;
        if (!(beta > 0) || -products.kpp + beta * products.kp_d >= 0) beta = 0;
        products.dd = products.pp - 2 * beta * products.p_d + beta * beta * products.dd;
        products.d_change = -products.p_change + beta * products.d_change;
        const float b = static_cast<float>(beta);
        each([&](int thread) {
            for_quads(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                const Vec<4> p = load(pt + at), qp = load(e + at);
                Vec<4> d = load(dt + at), q = load(qt + at);
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) {
                    d.at[c] = d.at[c] * b - p.at[c];
                    q.at[c] = q.at[c] * b - qp.at[c];
                }
                store(dt + at, d);
                store(qt + at, q);
                store(pt_old + at, p);
            });
        });
    }

    // E = Y + Y^T on and below the diagonal, and the coefficients of the sum of
    // ||H_ij + eta E_ij + eta^2 F_ij||^2 / (n_i n_j).
    DOMERGE_DEVICE Totals<kCoefficients> find_quartic() {
        auto quartic = total<kCoefficients>([&](int thread, double (&sums)[kCoefficients]) {
            for_lower(thread, [&](int row, int column) {
                Vec<4> flipped[4];
                DOMERGE_UNROLL
                for (int c = 0; c < 4; ++c) flipped[c] = load(e + (column + c) * kLd + row);
                float part[kCoefficients] = {};
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int at = (row + r) * kLd + column;
                    const Vec<4> x = load(h + at), z = load(pt + at);
                    Vec<4> y = load(e + at);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) {
                        y.at[c] += flipped[c].at[r];
                        if (row + r <= column + c || !crosses(row + r, column + c)) continue;
                        const float w = shared.inverse[row + r] * shared.inverse[column + c];
                        add_quartic(part, x.at[c], y.at[c], z.at[c], w);
                    }
                    store(e + at, y);
                }
                DOMERGE_UNROLL
                for (int k = 0; k < kCoefficients; ++k) sums[k] += part[k];
            });
        });
        quartic.at[1] *= 2;
        quartic.at[3] *= 2;
        return quartic;
    }

    static DOMERGE_DEVICE void add_quartic(float (&part)[kCoefficients], float x, float y, float z,
                                           float w) {
        part[0] += w * x * x;
        part[1] += w * x * y;
        part[2] += w * (y * y + 2 * x * z);
        part[3] += w * y * z;
        part[4] += w * z * z;
    }

    // The coefficients of every pair's ||H_ij + eta E_ij + eta^2 F_ij||^2. As many threads share a
    // pair as have 8 entries each, on average.
    DOMERGE_DEVICE void find_pair_quartics() {
        int lanes = 1;
        while (lanes < kThreads && lanes * 16 * pairs.count <= int64_t{rank} * rank / 2) lanes *= 2;
        const int at_once = kThreads / lanes;
        for (int64_t first = 0; first < pairs.count; first += at_once) {
            each([&](int thread) {
                float part[kCoefficients] = {};
                if (first + thread / lanes < pairs.count)
                    add_pair(part, first + thread / lanes, thread % lanes, lanes);
                DOMERGE_UNROLL
                for (int k = 0; k < kCoefficients; ++k) shared.partial[k][thread] = part[k];
            });
            each([&](int thread) {
                for (int i = thread; i < kCoefficients * at_once; i += kThreads) {
                    const int k = i / at_once, slot = i % at_once;
                    if (first + slot >= pairs.count) continue;
                    double sum = 0;
                    for (int l = 0; l < lanes; ++l) sum += shared.partial[k][slot * lanes + l];
                    pairs.quartic[k * kMaxPairs + first + slot] = k % 2 == 1 ? 2 * sum : sum;
                }
            });
        }
    }

    DOMERGE_DEVICE void add_pair(float (&part)[kCoefficients], int64_t p, int lane,
                                 int lanes) const {
        if (!(pairs.floor[p] > 0)) return;
        const int j = later_of(p), i = static_cast<int>(p - pair(0, j));
        const int width = shared.start[i + 1] - shared.start[i];
        const int entries = width * (shared.start[j + 1] - shared.start[j]);
        for (int k = lane; k < entries; k += lanes) {
            const int at = (shared.start[j] + k / width) * kLd + shared.start[i] + k % width;
            add_quartic(part, h[at], e[at], pt[at], 1.0f);
        }
    }

    DOMERGE_DEVICE Point pair_at(int64_t p, double eta) const {
        double c[kCoefficients];
        DOMERGE_UNROLL
        for (int k = 0; k < kCoefficients; ++k) c[k] = pairs.quartic[k * kMaxPairs + p];
        const Point energy = evaluate(c, eta);
        return Point{energy.value > 0 ? energy.value : 0.0, energy.slope, energy.curvature};
    }

    // V of the Frobenius penalty follows the energies at eta.
    DOMERGE_DEVICE void set_weights(double eta) {
        each([&](int thread) {
            for_pairs(thread, [&](int64_t p) {
                const double floor = pairs.floor[p];
                const double norm = sqrt(pair_at(p, eta).value + floor * floor);
                pairs.v[p] = norm > 0 ? static_cast<float>(2 / norm) : 0.0f;
            });
        });
    }

    // The sum of the smoothed norms.
    DOMERGE_DEVICE Point norms_at(double eta) {
        const Totals<3> totals = total<3>([&](int thread, double (&sums)[3]) {
            for_pairs(thread, [&](int64_t p) {
                const Point energy = pair_at(p, eta);
                const double floor = pairs.floor[p];
                if (!(floor > 0)) return;
                const double norm = sqrt(energy.value + floor * floor);
                const double first = energy.slope / (2 * norm);
                sums[0] += norm;
                sums[1] += first;
                sums[2] += (energy.curvature / 2 - first * first) / norm;
            });
        });
        return Point{totals.at[0], totals.at[1], totals.at[2]};
    }

    // The objective on one line. Ordered pairs count twice.
    struct Line {
        Descent& descent;
        double quartic[kCoefficients];  // of the squared penalty
        double change[3];               // gamma ||Xhat - X||^2

        DOMERGE_DEVICE Point operator()(double eta) const {
            const Point sum =
                descent.params.frobenius ? descent.norms_at(eta) : evaluate(quartic, eta);
            return Point{2 * sum.value + change[0] + eta * (change[1] + eta * change[2]),
                         2 * sum.slope + change[1] + 2 * eta * change[2],
                         2 * sum.curvature + 2 * change[2]};
        }
    };

    DOMERGE_DEVICE Line find_line(double q0, double q1, double q2) {
        const Totals<kCoefficients> quartic = find_quartic();
        if (params.frobenius) find_pair_quartics();
        Line line{*this, {}, {params.gamma * q0, params.gamma * q1, params.gamma * q2}};
        DOMERGE_UNROLL
        for (int k = 0; k < kCoefficients; ++k) line.quartic[k] = quartic.at[k];
        return line;
    }

    // C += eta D and H += eta E + eta^2 F.
    DOMERGE_DEVICE void take_step(double step) {
        const float eta = static_cast<float>(step), square = static_cast<float>(step * step);
        each([&](int thread) {
            for_quads(thread, [&](int row, int column) {
                const int at = row * kLd + column;
                const Vec<4> d = load(dt + at);
                Vec<4> c = load(ct + at);
                DOMERGE_UNROLL
                for (int k = 0; k < 4; ++k) c.at[k] += d.at[k] * eta;
                store(ct + at, c);
            });
            for_lower(thread, [&](int row, int column) {
                DOMERGE_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int at = (row + r) * kLd + column;
                    const Vec<4> y = load(e + at), z = load(pt + at);
                    Vec<4> x = load(h + at);
                    DOMERGE_UNROLL
                    for (int c = 0; c < 4; ++c) x.at[c] += y.at[c] * eta + z.at[c] * square;
                    store(h + at, x);
                }
            });
        });
    }

    // The descent from C = I; leaves C in ct.
    DOMERGE_DEVICE Stats descend() {
        const double energy_before = cross_energy();
        Stats stats{};
        stats.objective_before = find_line(0, 0, 0)(0.0).value;  // E = F = 0
        stats.objective_after = stats.objective_before;
        if (params.frobenius) set_weights(0.0);
        double moved = 0.0, kpp_old = 0.0;
        Gains gains{};
        Products products{};
        for (int64_t step = 0; energy_before > 0 && step < params.steps; ++step) {
            weigh();
            if (step == 0) find_curvatures();
            if (!find_direction(products, kpp_old)) break;
            kpp_old = products.kpp;
            const Line line = find_line(moved, 2 * products.d_change, products.dd);
            const double before = line(0.0).value;
            double after = before;
            const double eta = best_step(line, before, &after);
            if (!(eta > 0)) break;
            take_step(eta);
            if (params.frobenius) set_weights(eta);
            moved += eta * (2 * products.d_change + eta * products.dd);
            products.d_change += eta * products.dd;
            stats.steps += 1;
            stats.objective_after = after;
            if (enough(gains, before - after, params.tol * after)) break;
        }
        stats.cross_left = energy_before > 0 ? cross_energy() / energy_before : 0.0;
        stats.change = sqrt(moved > 0 ? moved : 0.0);
        return stats;
    }

    DOMERGE_DEVICE void finish(float* out, double* row, const Stats& stats) {
        each([&](int thread) {
            for (int i = thread; i < rank * rank; i += kThreads)
                out[i] = ct[i % rank * kLd + i / rank];
            if (thread != 0) return;
            row[0] = stats.steps;
            row[1] = stats.objective_before * scale;
            row[2] = stats.objective_after * scale;
            row[3] = stats.cross_left;
            row[4] = stats.change / sqrt(static_cast<double>(rank));
        });
    }
};

using DescentSizes = Sizes<16, 32, 64, 96, 128, 192, 256>;

// How a launch is spread over a device.
template <class Kernel>
struct Spread {
    int resident;
    int64_t blocks;

    Spread(const Device& device, int64_t problems)
        : resident(Kernel::resident(device.shared_bytes)),
          blocks(std::min(problems, device.multiprocessors * Kernel::kBlocksPerSm)) {}
};

}  // namespace

std::vector<int64_t> orthogonalize_sizes() {
    return DescentSizes::list();
}

int64_t orthogonalize_scratch(int64_t size, int64_t problems, bool frobenius) {
    int64_t bytes = 0;
    DescentSizes::with(size, [&](auto chosen) {
        using Kernel = Descent<decltype(chosen)::value>;
        const Spread<Kernel> spread(current_device(), problems);
        bytes = spread.blocks * Kernel::scratch_bytes(spread.resident, frobenius);
    });
    return bytes;
}

void orthogonalize(int64_t size, Address work, int64_t problems, Address starts, Address out,
                   Address stats, Address scratch, bool frobenius, double gamma, int64_t steps,
                   double tol, Stream stream) {
    DescentSizes::with(size, [&](auto chosen) {
        using Kernel = Descent<decltype(chosen)::value>;
        const Spread<Kernel> spread(current_device(), problems);
        const DescentParams params{at<const int64_t>(work),
                                   at<const int64_t>(starts),
                                   at<float>(out),
                                   at<double>(stats),
                                   at<char>(scratch),
                                   problems,
                                   spread.blocks,
                                   spread.resident,
                                   frobenius,
                                   gamma,
                                   steps,
                                   tol};
        launch<Kernel>(spread.blocks, Kernel::shared_bytes(spread.resident), params, stream);
    });
}

}  // namespace domerge
