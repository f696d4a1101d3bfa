// C as tensor cores take it: in two 16-bit parts that together have its 16 leading bits in
// bfloat16, and 22 in float16, where every row is first brought to a size that float16 holds. They
// are made once (split.cu) and serve all blocks.
#pragma once

#include "table.h"

namespace domerge {

// Of every row the higher parts, then the lower ones, eight numbers a unit. Behind all rows is, of
// float16, what every row of results is to be multiplied by.
struct SplitMatrix {
    Words* data;
    int rows;
    int units;  // of a part of a row: an even number, 32 bytes being what memory gives at least

    DOMERGE_DEVICE SplitMatrix(Address data, int rows, int columns)
        : data(global(reinterpret_cast<Words*>(data))),
          rows(rows),
          units((columns + 15) / 16 * 2) {}

    DOMERGE_DEVICE Words* at(int row, int unit) const {
        return data + int64_t{row} * 2 * units + unit;
    }
    DOMERGE_DEVICE float& inverse(int row) const {
        return reinterpret_cast<float*>(at(rows, 0))[row];
    }
};

}  // namespace domerge
