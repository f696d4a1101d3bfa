// What every kernel works on: plain numbers and pointers, shared by all backends.
#pragma once

#include <cstdint>

namespace domerge {

// Blocks of problems are never float64.
enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

// One adapter's X_i [rank, d]; `scale` multiplies it on reading. `pitch` is the distance in
// elements from one row of its memory to the next.
struct Block {
    const void* data;
    int64_t rank;
    int64_t pitch;
    double scale;
    DType dtype;
};

// One side of one module: X [rank, d], the blocks stacked.
struct Problem {
    const Block* blocks;
    int64_t count;
    int64_t rank;
    int64_t d;
    bool columns;  // memory of a block: row-major [d, rank] if set, else [rank, d]
};

}  // namespace domerge
