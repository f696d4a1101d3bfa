// When a descent ends, and what counts as nothing in it: the same for every processor, and in
// backends/descent.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DOMERGE_ANYWHERE static __host__ __device__ __forceinline__
#else
#define DOMERGE_ANYWHERE static inline __attribute__((always_inline))
#endif

namespace domerge {

constexpr double kNegligible = 1e-6;      // share of the largest norm below which a factor is left
constexpr double kFrobeniusFloor = 1e-3;  // EPS: what smooths the norm at zero
constexpr double kLeastCurvature = 1e-4;  // of the largest: less would make all others wait
constexpr double kGuard = 3;              // times what is left by the gains so far
constexpr double kSlowing = 2;            // ratios of gains that grow go on growing so much less
constexpr double kLittle = 0.1;           // of what is allowed: a step that gains less is the last

// What steps have lowered the objective by, the last one first.
struct Gains {
    double at[3];
    int64_t count;
};

// One over which a factor's rows are preconditioned, given the mean curvature of the penalty along
// them and the largest of any factor; 0 where the factor overlaps with none.
DOMERGE_ANYWHERE double bounded_curvature(double curvature, double largest, double gamma) {
    if (!(curvature > 0)) return 0;
    const double least = kLeastCurvature * largest;
    return 2 * gamma + (curvature > least ? curvature : least);
}

// Adds a step's gain, and tells whether what is left to gain is below what is allowed, kGuard times
// over, if gains keep falling as they did at worst in the last two steps, or where they fall less
// and less, as they would in the next.
DOMERGE_ANYWHERE bool enough(Gains& gains, double gain, double allowed) {
    gains.at[2] = gains.at[1];
    gains.at[1] = gains.at[0];
    gains.at[0] = gain;
    gains.count += 1;
    if (!(allowed > 0)) allowed = 0;
    if (gain <= kLittle * allowed) return true;
    if (gains.count < 3) return false;
    const double now = gain / gains.at[1], before = gains.at[1] / gains.at[2];
    const double next = now * now / before / kSlowing;
    double ratio = now > before ? now : before;
    if (next > ratio) ratio = next;
    return ratio < 1 && kGuard * gain * ratio <= allowed * (1 - ratio);
}

}  // namespace domerge
