#include "magnitudes.h"

namespace domerge {

namespace {

struct RootsWork {
    Address matrix;
    int64_t rank;
    int64_t offset;
};

struct RootsParams {
    const RootsWork* work;
    float* out;
    float* norms;
    double* scratch;  // as large as out: the rows before they are rounded
};

// Cholesky with diagonal pivoting, a row at a step; a thread has every kThreads-th column. The root
// has its columns in the order of the pivots, then those that were none, and lies as magnitudes.h
// reads it.
struct Roots {
    using Params = RootsParams;
    static constexpr int kThreads = 128;
    static constexpr int kBlocksPerSm = 4;
    static constexpr int kMaxRank = 256;
    // What is left of the diagonal, before and after a step: threads still read the one when others
    // write the other.
    static constexpr int64_t kLeftBytes = 2 * kMaxRank * sizeof(double);
    // The step in which a column was the pivot, or -1; and the columns in their order.
    static constexpr int64_t kSharedBytes = kLeftBytes + 2 * kMaxRank * sizeof(int);
    static_assert(kSharedBytes <= kSmallestShared);

    // A number and where it is.
    struct Candidate {
        double number;
        int place;

        DOMERGE_DEVICE void take(const Candidate& other) {
            const bool better =
                other.number > number || (other.number == number && other.place < place);
            number = better ? other.number : number;
            place = better ? other.place : place;
        }
    };

    // The place of the largest number, the first of equals: every warp finds it for itself, a lane
    // every 32nd number and then half as many lanes at a time.
    static DOMERGE_DEVICE int largest(const double* left, int rank) {
        Fragment<Candidate, 1> found;
        lanes([&](int lane) {
            const int first = lane < rank ? lane : 0;
            Candidate& own = found.of(lane)[0];
            own = {left[first], first};
            DOMERGE_ROLLED
            for (int i = lane + kLanesOfWarp; i < rank; i += kLanesOfWarp) own.take({left[i], i});
        });
        DOMERGE_UNROLL
        for (int distance = kLanesOfWarp / 2; distance > 0; distance /= 2) {
#ifdef __CUDACC__
            Candidate& own = found.values[0];
            const double number = __shfl_xor_sync(0xffffffffu, own.number, distance);
            const int place = __shfl_xor_sync(0xffffffffu, own.place, distance);
            own.take({number, place});
#else
            for (int lane = 0; lane < distance; ++lane)
                found.of(lane)[0].take(found.of(lane + distance)[0]);
#endif
        }
#ifdef __CUDACC__
        return __shfl_sync(0xffffffffu, found.values[0].place, 0);  // one for all, of NaN as well
#else
        return found.of(0)[0].place;
#endif
    }

    static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block) {
        const RootsWork& work = params.work[block.index];
        const int rank = static_cast<int>(work.rank);
        const auto* matrix = global(reinterpret_cast<const double*>(work.matrix));
        double* const rows = params.scratch + work.offset;
        float* const out = params.out + work.offset;
        double* const both = reinterpret_cast<double*>(block.shared);
        int* const step_of = reinterpret_cast<int*>(block.shared + kLeftBytes);
        int* const order = step_of + kMaxRank;
        block.each([&](int thread) {
            for (int i = thread; i < rank; i += kThreads) {
                both[i] = matrix[i * rank + i];
                step_of[i] = -1;
            }
        });
        double trace = 0.0;
        for (int i = 0; i < rank; ++i) trace += both[i];
        const double norm = trace > 0.0 ? std::sqrt(trace) : 0.0;
        block.each([&](int thread) {
            if (thread == 0) params.norms[block.index] = static_cast<float>(norm);
        });
        int steps = 0;
        for (; trace > 0.0 && steps < rank; ++steps) {
            const int k = steps;
            const double* const left = both + k % 2 * kMaxRank;
            double* const next = both + (k + 1) % 2 * kMaxRank;
            const int pivot = largest(left, rank);
            if (!(left[pivot] > 1e-16 * rank * trace)) break;
            const double inverse = 1.0 / std::sqrt(left[pivot]);
            block.each([&](int thread) {
                for (int i = thread; i < rank; i += kThreads) {
                    double value = matrix[pivot * rank + i];
                    for (int m = 0; m < k; ++m)
                        value -= rows[m * rank + pivot] * rows[m * rank + i];
                    value = left[i] < 0.0 ? 0.0 : value * inverse;
                    rows[k * rank + i] = value;
                    // -1: used up, later rows are zero here.
                    next[i] = i == pivot || left[i] < 0.0 ? -1.0 : left[i] - value * value;
                    if (i == pivot) {
                        step_of[i] = k;
                        order[k] = i;
                    }
                }
            });
        }
        block.each([&](int thread) {
            for (int i = thread; i < rank; i += kThreads) {
                if (step_of[i] >= 0) continue;
                int place = steps;
                for (int j = 0; j < i; ++j) place += step_of[j] < 0 ? 1 : 0;
                order[place] = i;
            }
        });
        block.each([&](int thread) {
            const int size = 8 * eights_of(rank);
            for (int e = thread; e < size * size; e += kThreads) {
                const int row = e / size, column = e % size;
                const bool inside = row < steps && column < rank;
                const double value = inside ? rows[row * rank + order[column]] / norm : 0.0;
                out[root_place(rank, row, column)] = static_cast<float>(value);
            }
            for (int i = thread; i < size; i += kThreads)
                out[size * size + i] = from_bits(i < rank ? order[i] : 0);
        });
    }
};

}  // namespace

void roots(Address work, int64_t count, Address out, Address norms, Address scratch,
           Stream stream) {
    const RootsParams params{at<const RootsWork>(work), at<float>(out), at<float>(norms),
                             at<double>(scratch)};
    launch<Roots>(count, Roots::kSharedBytes, params, stream);
}

}  // namespace domerge
