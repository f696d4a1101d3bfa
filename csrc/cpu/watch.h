// Whether what is written is finite, seen on the way: another pass over results would take as long
// as reading them does.
#pragma once

#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

// A loop has one of its own, which stays in a register: one it only refers to may be what it stores
// to, for all that a compiler knows.
class Watch {
 public:
    DOMERGE_INLINE void add(FloatVec v) {
        const IndexVec size = bits<IndexVec>(v) & 0x7fffffff;
        top_ = size > top_ ? size : top_;
    }
    // The first n numbers only.
    DOMERGE_INLINE void add(FloatVec v, int64_t n) {
        if (n >= kWidth) return add(v);
        IndexVec lane{};
        for (int i = 0; i < kWidth; ++i) lane[i] = i;
        add(where(lane < static_cast<int32_t>(n), v, FloatVec{}));
    }
    // Whether all are finite, rounded to the dtype: rounding keeps the largest the largest.
    bool finite(DType dtype) const {
        bool found = false;
        with_dtype(dtype, [&](auto format) {
            typename decltype(format)::Storage rounded[kWidth];
            decltype(format)::store(rounded, bits<FloatVec>(top_));
            const FloatVec v = decltype(format)::load(rounded);
            found = !any(v - v != FloatVec{});
        });
        return found;
    }

 private:
    // The largest magnitudes, of which the bits are in order as whole numbers: Inf is above all
    // numbers, NaN above Inf.
    IndexVec top_{};
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
