#pragma once

#include <vector>

#include "types.h"

namespace domerge {

// A descent on R x R matrices of R above the sizes of orthogonalize, by the same rule: step by
// step, so that the caller may stop when no problem goes on. Of each, `memory` begins with a
// float64 that is not 0 while it does.
struct TiledDescent {
    int64_t size;  // R at most
    Address work;  // as in orthogonalize
    int64_t problems;
    Address starts;
    Address memory;  // [problems, each] bytes, aligned to 128
    int64_t each;    // a multiple of 128, at least tiled_descent_bytes
    Address out;
    Address stats;
    bool frobenius;
    double gamma;
    double tol;

    void begin(Stream stream) const;
    void step(bool first, Stream stream) const;
    void finish(Stream stream) const;
};

// Bytes of a problem's memory. adapters: the largest T.
int64_t tiled_descent_bytes(int64_t size, int64_t adapters, bool frobenius);

}  // namespace domerge
