// Products of panels (factor_kernels.h), a block of squares at a time.
#pragma once

#include "factor_kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

// Some panels, `stride` numbers apart.
template <class Number>
struct Panels {
    const Number* first;
    int64_t stride;
    int64_t count;

    const Number* at(int64_t panel, int64_t unit) const {
        return first + panel * stride + unit * kUnitNumbers;
    }
};

constexpr int64_t kPieceBytes = 4096;  // fetched ahead during one product

// A piece, or none, of which some lines at a time are fetched to L2.
class Piece {
 public:
    explicit Piece(const void* begin)
        : line_(static_cast<const char*>(begin)), end_(line_ ? line_ + kPieceBytes : nullptr) {}

    // Of each of so many parts of a product.
    static constexpr int64_t lines(int64_t parts) {
        return (kPieceBytes / kLine + parts - 1) / parts;
    }

    DOMERGE_INLINE void fetch(int64_t lines) {
        for (int64_t k = 0; k < lines && line_ != end_; ++k, line_ += kLine)
            __builtin_prefetch(line_, 0, 2);
    }

 private:
    static constexpr int64_t kLine = 64;
    const char *line_, *end_;
};

// Square (i, j) of a block, [32, 32] at out(i, j), = (first) or += left panel i times right panel
// j, for the i >= j + above. The block's sums stay in L2 while the panels pass by, a stretch at a
// time: of the right panel it stays in L1. With every product goes a piece of the next stretch from
// memory to L2: its latency is what these products would wait for.
template <class P, class Out>
void multiply_block(const Panels<typename P::Number>& left, const Panels<typename P::Number>& right,
                    int64_t units, int64_t above, int64_t ld, Out out, bool first = true) {
    constexpr int64_t stretch_bytes = P::kStretch * kUnitNumbers * sizeof(typename P::Number);
    constexpr int64_t pieces = stretch_bytes / kPieceBytes;
    for (int64_t u = 0; u < units; u += P::kStretch) {
        poll();
        const int64_t count = least(P::kStretch, units - u), next = u + P::kStretch;
        int64_t piece = next < units ? 0 : (left.count + right.count) * pieces;
        for (int64_t j = 0; j < right.count; ++j) {
            for (int64_t i = j + above > 0 ? j + above : 0; i < left.count; ++i, ++piece) {
                const int64_t panel = piece / pieces;
                const void* ahead = nullptr;
                if (panel < left.count + right.count) {
                    const auto* from = panel < left.count ? left.at(panel, next)
                                                          : right.at(panel - left.count, next);
                    ahead = reinterpret_cast<const char*>(from) + piece % pieces * kPieceBytes;
                }
                P::multiply(left.at(i, u), right.at(j, u), count, out(i, j), ld, first && u == 0,
                            ahead);
            }
        }
    }
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
