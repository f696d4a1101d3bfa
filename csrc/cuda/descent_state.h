// What one thread block has of a descent on R x R matrices: where its matrices lie, loops over
// them, and sums over all threads.
//
// R is padded to kSize. What is beyond R is zero in every matrix, so that it changes no sum. As
// many matrices as fit are in shared memory. The others are scratch memory of a block that stays
// and takes one problem after the other.
#pragma once

#include "descent_rule.h"
#include "square_product.h"

namespace domerge {

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

template <int kSize>
struct DescentState {
    using Product = SquareProduct<kSize>;
    static constexpr int kThreads = Product::kThreads;
    static constexpr int kLd = Product::kLd;
    // Whether a product can replace one of its operands.
    static constexpr bool kInPlace = Product::kRegion == kSize;
    static constexpr int kMatrices = kInPlace ? 7 : 8;
    static constexpr int64_t kMatrixBytes = int64_t{4} * kSize * kLd;
    static constexpr int kMaxPairs = kSize * (kSize - 1) / 2;
    static constexpr int64_t kPairsBytes = int64_t{kMaxPairs} * (8 * (kCoefficients + 1) + 4);

    struct Shared {
        union {
            typename Product::Panels panels;
            double partial[kSums][kThreads];
        };
        double group[kSums][kGroups];
        double total[kSums];
        double scale;                        // that G is divided by
        double norm[kSize];                  // n_j of every factor, 0 if negligible
        float inverse[kSize];                // 1 / n of every row's factor, 0 if negligible
        alignas(16) float curvature[kSize];  // K of every row, and
        alignas(16) float step[kSize];       // its inverse, 0 of one that stays
        int owner[kSize];                    // the factor of every row, -1 beyond R
        int start[kSize + 1];
    };
    static constexpr int64_t kOwnBytes = (sizeof(Shared) + 15) / 16 * 16;  // matrices follow
    static_assert(kOwnBytes <= kSmallestShared);

    static int resident(int64_t shared_bytes) {
        const int64_t room = (shared_bytes - kOwnBytes) / kMatrixBytes;
        return static_cast<int>(room < kMatrices ? room : kMatrices);
    }
    DOMERGE_ANYWHERE int64_t shared_bytes(int resident) {
        return kOwnBytes + resident * kMatrixBytes;
    }
    DOMERGE_ANYWHERE int64_t scratch_bytes(int resident, bool frobenius) {
        const int64_t pairs_bytes = frobenius ? kPairsBytes : 0;
        return ((kMatrices - resident) * kMatrixBytes + pairs_bytes + 127) / 128 * 128;
    }

    const DescentParams& params;
    Block<kThreads>& block;
    Shared& shared;
    const int problem;      // of the launch
    const int rank, count;  // R, and factors
    char* const scratch;    // where matrix 0 would be, were all in scratch memory
    bool swapped = false;   // pt and next, since the last step

    DOMERGE_DEVICE DescentState(const DescentParams& params, Block<kThreads>& block, int problem)
        : params(params),
          block(block),
          shared(*reinterpret_cast<Shared*>(block.shared)),
          problem(problem),
          rank(static_cast<int>(work(1))),
          count(static_cast<int>(work(2))),
          scratch(params.scratch + block.index * scratch_bytes(params.resident, params.frobenius) -
                  params.resident * kMatrixBytes) {}

    // A number of the problem's, read when it is needed: few have to be in registers all the time.
    DOMERGE_DEVICE int64_t work(int place) const {
        return params.work[6 * opaque(problem) + place];
    }

    // The matrices, the busiest first: they get the shared memory.
    DOMERGE_DEVICE float* ct() const { return place(0); }  // C^T
    // P^T; before it, where a product can replace its operand, M.
    DOMERGE_DEVICE float* pt() const { return place(swapped ? 2 : 1); }
    // The last P^T, then G P^T, then Y, then E below the diagonal and F^T above it.
    DOMERGE_DEVICE float* next() const { return place(swapped ? 1 : 2); }
    DOMERGE_DEVICE float* qt() const { return place(3); }  // Q^T
    DOMERGE_DEVICE float* dt() const { return place(4); }  // D^T
    DOMERGE_DEVICE float* h() const { return place(5); }   // H, below the diagonal only
    DOMERGE_DEVICE float* gram() const { return place(6); }
    DOMERGE_DEVICE float* weighted() const { return kInPlace ? pt() : place(7); }  // M = V o H

    // Where a matrix is, found anew every time: a pointer for each of them would take registers.
    DOMERGE_DEVICE float* place(int index) const {
        index = opaque(index);
        char* const first = index < params.resident ? block.shared + kOwnBytes : scratch;
        return reinterpret_cast<float*>(first + index * kMatrixBytes);
    }

    // What pairs of factors want (descent_pairs.h); their numbers are beyond the matrices.
    DOMERGE_DEVICE double norm(int j) const { return shared.norm[j]; }
    DOMERGE_DEVICE int first_row(int j) const { return shared.start[j]; }
    DOMERGE_DEVICE int owner(int i) const { return shared.owner[i]; }
    DOMERGE_DEVICE float inverse(int i) const { return shared.inverse[i]; }
    DOMERGE_DEVICE float& step(int i) const { return shared.step[i]; }
    DOMERGE_DEVICE float& curvature(int i) const { return shared.curvature[i]; }
    DOMERGE_DEVICE double* pair_numbers() const {
        return reinterpret_cast<double*>(scratch + kMatrices * kMatrixBytes);
    }
    static constexpr DOMERGE_DEVICE int pair_room() { return kMaxPairs; }

    // Entries below the diagonal of H, E and F.
    struct Entry {
        float x, y, z;
    };
    struct Entries {
        const float* h;
        const float* changes;
        DOMERGE_DEVICE Entry operator()(int row, int column) const {
            const int at = row * kLd + column;
            return {h[at], changes[at], changes[column * kLd + row]};
        }
    };
    DOMERGE_DEVICE Entries entries() const { return {h(), next()}; }

    // A phase of many: the addresses that it uses should not fill the registers of the others.
    template <class Phase>
    DOMERGE_DEVICE void each(Phase phase) const {
        block.each([&](int thread) { phase(opaque(thread)); });
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
    DOMERGE_DEVICE Totals<kCount> total(Part part) const {
        return add_up<kCount, kThreads>(shared, [&](auto phase) { each(phase); }, part);
    }

    // Ct = I, H = G / scale, D = Q = P = E = F = 0 and the factors' norms.
    DOMERGE_DEVICE void begin() {
        const float* const g = global(reinterpret_cast<const float*>(work(0)));
        const double trace = total<1>([&](int thread, double (&sums)[1]) {
                                 for (int i = thread; i < rank; i += kThreads)
                                     sums[0] += g[static_cast<int64_t>(i) * rank + i];
                             }).at[0];
        const double scale = trace > 0 ? trace / rank : 1.0;
        each([&](int thread) {
            float *const gram = this->gram(), *const h = this->h(), *const ct = this->ct();
            float *const pt = this->pt(), *const next = this->next(), *const dt = this->dt(),
                         *const qt = this->qt();
            for_quads<kSize, kThreads>(thread, [&](int row, int column) {
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
                for (float* zero : {pt, next, dt, qt}) store(zero + at, Vec<4>{});
            });
            DOMERGE_ROLLED
            for (int i = thread; i < kSize; i += kThreads) {
                shared.owner[i] = -1;
                shared.inverse[i] = 0.0f;
            }
            const int64_t* const starts = params.starts + work(3);
            for (int j = thread; j <= count; j += kThreads)
                shared.start[j] = static_cast<int>(starts[j]);
            if (thread == 0) shared.scale = scale;
        });
        find_norms();
    }

    DOMERGE_DEVICE void find_norms() const {
        PerThread<double, kThreads> largest;
        each([&](int thread) {
            const float* const gram = this->gram();
            DOMERGE_ROLLED
            for (int j = thread; j < count; j += kThreads) {
                double trace = 0;
                DOMERGE_ROLLED
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
            DOMERGE_ROLLED
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

    // Ct - I, exactly, of two entries of Ct: the difference is what the change is measured by.
    DOMERGE_DEVICE Vec<2> change(Vec<2> c, int row, int column) const {
        DOMERGE_UNROLL
        for (int k = 0; k < 2; ++k)
            if (row == column + k && row < rank) c.at[k] -= 1.0f;
        return c;
    }
};

}  // namespace domerge
