// Products of float32 matrices with long sums: of panels of float32 numbers, or of bfloat16 ones,
// with every number in two parts, high + low, which are it to 2^-17; high high + high low + low
// high are the product to 2^-16.
#pragma once

#include "factor_blocks.h"
#include "long_product.h"

namespace domerge {
namespace DOMERGE_ISA {

template <class P, int64_t kParts>
struct LongProducts {
    using Number = typename P::Number;

    static int64_t panels(int64_t columns) { return (columns + kUnit - 1) / kUnit; }

    // Panels of one part of an operand, `units` units each. Those of the next part follow.
    static Number* part(const LongProduct& x, const LongOperand& operand, int64_t part) {
        return static_cast<Number*>(operand.panels) +
               part * panels(operand.columns) * x.units * kUnitNumbers;
    }

    // pack(block, to): a unit of `to` from block [32, 32].
    template <class Pack>
    static void pack(const LongProduct& x, const LongOperand& operand, int64_t panel, Pack pack) {
        alignas(64) float blocks[kParts][kUnitNumbers];
        for (int64_t u = 0; u < x.units; ++u) {
            poll();
            for (int64_t k = 0; k < kUnit; ++k) {
                const int64_t row = x.begin + u * kUnit + k;
                for (int64_t i = 0; i < kUnit; i += kWidth) {
                    const int64_t c = panel * kUnit + i;
                    const int64_t n = row < x.depth ? operand.columns - c : 0;
                    FloatVec v{};
                    if (n > 0) v = load_some<Float32>(operand.data + row * operand.columns + c, n);
                    for (int64_t p = 0; p < kParts; ++p) {
                        FloatVec own = v;
                        if constexpr (kParts > 1)
                            if (p + 1 < kParts) own = P::leading(v);
                        store(blocks[p] + k * kUnit + i, own);
                        v -= own;
                    }
                }
            }
            const int64_t at = (panel * x.units + u) * kUnitNumbers;
            for (int64_t p = 0; p < kParts; ++p) pack(blocks[p], part(x, operand, p) + at);
        }
    }

    static void pack_left(const LongProduct& x, int64_t panel) {
        pack(x, x.left, panel, P::pack_left);
    }

    static void pack_right(const LongProduct& x, int64_t panel) {
        pack(x, x.right, panel, P::pack_right);
    }

    static Panels<Number> block(const LongProduct& x, const LongOperand& operand, int64_t of_part,
                                int64_t first, int64_t most) {
        const int64_t stride = x.units * kUnitNumbers;
        return {part(x, operand, of_part) + first * stride, stride,
                least(most, panels(operand.columns) - first)};
    }

    static void multiply(const LongProduct& x, int64_t bi, int64_t bj, Arena& arena) {
        const int64_t i = bi * P::kBlockRows, j = bj * P::kBlockColumns;
        const int64_t ld = row_stride<float>(P::kBlockColumns * kUnit);
        float* sums = take_matrix(arena, P::kBlockRows * kUnit, ld);
        {
            [[maybe_unused]] const typename P::Session session{};
            for (int64_t left = 0; left < kParts; ++left)
                for (int64_t right = 0; left + right < kParts; ++right)
                    multiply_block<P>(
                        block(x, x.left, left, i, P::kBlockRows),
                        block(x, x.right, right, j, P::kBlockColumns), x.units, -P::kBlockColumns,
                        ld, [&](int64_t k, int64_t l) { return sums + (k * ld + l) * kUnit; },
                        left + right == 0);
        }
        const int64_t columns = x.right.columns, first = j * kUnit;
        const int64_t width = least(P::kBlockColumns * kUnit, columns - first);
        const int64_t rows = least(P::kBlockRows * kUnit, x.left.columns - i * kUnit);
        for (int64_t r = 0; r < rows; ++r) {
            float* to = x.out + (i * kUnit + r) * columns + first;
            const float* from = sums + r * ld;
            for (int64_t c = 0; c < width; c += kWidth) {
                const FloatVec sum = load<FloatVec>(from + c);
                const FloatVec before =
                    x.begin ? load_some<Float32>(to + c, width - c) : FloatVec{};
                store_some<Float32>(to + c, before + sum, width - c);
            }
        }
    }

    static constexpr LongKernels kernels() {
        return {kUnit,
                kUnit,
                kParts * kUnitNumbers * sizeof(Number),
                P::kBlockRows,
                P::kBlockColumns,
                pack_left,
                pack_right,
                multiply};
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
