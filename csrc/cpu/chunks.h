// Work items of an op: pieces of its problems, and which comes first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace domerge {

// Positions by falling cost.
inline std::vector<int64_t> largest_first(const std::vector<double>& cost) {
    std::vector<int64_t> order(cost.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return cost[a] > cost[b]; });
    return order;
}

struct Chunk {
    int64_t problem;
    int64_t begin;
    int64_t end;
};

// Pieces of fixed width of every problem's columns; those of a problem are next to each other.
inline std::vector<Chunk> chunks_of(const std::vector<Problem>& problems, int64_t width) {
    std::vector<Chunk> chunks;
    for (size_t p = 0; p < problems.size(); ++p)
        for (int64_t begin = 0; begin < problems[p].d; begin += width)
            chunks.push_back(
                Chunk{static_cast<int64_t>(p), begin, std::min(begin + width, problems[p].d)});
    return chunks;
}

}  // namespace domerge
