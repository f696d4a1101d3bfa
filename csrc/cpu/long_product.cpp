#include "long_product.h"

#include <algorithm>

#include "dispatch.h"
#include "threads.h"

namespace domerge {

namespace {

constexpr int64_t kUnits = 64;  // of the rows that are packed at once

int64_t parts(int64_t count, int64_t size) {
    return (count + size - 1) / size;
}

}  // namespace

void long_product(const Kernels& kernels, uint64_t left, uint64_t right, int64_t depth,
                  int64_t rows, int64_t columns, uint64_t out, bool half, int threads) {
    const LongKernels& of = half && kernels.long_half ? *kernels.long_half : *kernels.long_single;
    const int64_t lefts = parts(rows, of.panel_columns), rights = parts(columns, of.panel_columns);
    const int64_t blocks = parts(lefts, of.block_rows), across = parts(rights, of.block_columns);
    const int64_t units = std::min(kUnits, parts(depth, of.unit_rows));
    Arena memory;
    LongProduct x{{at<const float>(left), rows, memory.take(lefts * units * of.unit_bytes)},
                  {at<const float>(right), columns, memory.take(rights * units * of.unit_bytes)},
                  depth,
                  0,
                  units,
                  at<float>(out)};
    for (; x.begin < depth; x.begin += units * of.unit_rows) {
        x.units = std::min(units, parts(depth - x.begin, of.unit_rows));
        parallel_for(lefts + rights, threads, [&](int64_t panel, Arena&) {
            panel < lefts ? of.pack_left(x, panel) : of.pack_right(x, panel - lefts);
        });
        parallel_for(blocks * across, threads, [&](int64_t item, Arena& arena) {
            of.multiply(x, item / across, item % across, arena);
        });
    }
}

bool half_long_products(const Kernels& kernels) {
    return kernels.long_half != nullptr;
}

}  // namespace domerge
