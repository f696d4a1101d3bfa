// The largest magnitude of a stretch of memory.
#pragma once

#include <limits>

#include "kernels.h"
#include "simd.h"

namespace domerge {
namespace DOMERGE_ISA {

// Of a format's bits as a whole number, without the sign: Inf is above all numbers, NaN above Inf.
template <class Int>
Int largest_bits(const void* data, int64_t count) {
    const Int* p = static_cast<const Int*>(data);
    Int top = 0;
    for (int64_t i = 0; i < count; ++i) {
        const Int size = p[i] & std::numeric_limits<Int>::max();
        top = size > top ? size : top;
    }
    return top;
}

inline double largest(const void* data, int64_t count, DType dtype) {
    if (dtype == DType::float64) return bits<double>(largest_bits<int64_t>(data, count));
    double found = 0.0;
    with_dtype(dtype, [&](auto format) {
        using Storage = typename decltype(format)::Storage;
        using Int = std::conditional_t<sizeof(Storage) == 4, int32_t, int16_t>;
        const Storage top = bits<Storage>(largest_bits<Int>(data, count));
        found = load_some<decltype(format)>(&top, 1)[0];
    });
    return found;
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
