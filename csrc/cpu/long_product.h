// left^T right of float32 matrices with thousands of rows, to float32 sums: long_product.cpp.
#pragma once

#include "kernels.h"

namespace domerge {

struct LongOperand {
    const float* data;  // [depth, columns]
    int64_t columns;
    void* panels;  // units of 32 of its rows
};

// What rows [begin, begin + 32 units) of both add to the product.
struct LongProduct {
    LongOperand left, right;
    int64_t depth;
    int64_t begin, units;  // of 32 rows
    float* out;            // [left.columns, right.columns]
};

struct LongKernels {
    int64_t panel_columns;
    int64_t unit_rows, unit_bytes;      // of a panel
    int64_t block_rows, block_columns;  // of panels, of what is multiplied at once
    void (*pack_left)(const LongProduct&, int64_t panel);
    void (*pack_right)(const LongProduct&, int64_t panel);
    // out = where begin is 0, else out +=, of block (i, j).
    void (*multiply)(const LongProduct&, int64_t i, int64_t j, Arena&);
};

}  // namespace domerge
