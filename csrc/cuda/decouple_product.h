// C A of a tile, in float32 in memory where apply_decouple goes on with it.
#pragma once

#include "tensor_product.h"

namespace domerge {

// On float32 units.
template <class Format, int kRows>
struct OnUnits {
    using Product = domerge::Product<Format, kRows>;
    using Coefficients = Matrix;
    static constexpr int64_t kSharedBytes = sizeof(float) * Product::kShared;

    // values = C[row, …] A[…, column], kRows lines of kStride numbers, which may be where the
    // block's shared memory begins.
    template <int kStride>
    static DOMERGE_DEVICE void run(Block<kBlockThreads>& block, const Matrix& c,
                                   const Reader<Format>& a, int row, int column, float* values) {
        using Result = typename Product::Result;
        typename Product::Sums sums;
        Product::run(block, reinterpret_cast<float*>(block.shared), c, a, row, column, sums);
        block.each([&](int thread) {
            constexpr int rows = sizeof(sums[0].at) / sizeof(sums[0].at[0]);
            constexpr int columns = sizeof(sums[0].at[0]) / sizeof(float);
            DOMERGE_UNROLL
            for (int i = 0; i < rows; ++i) DOMERGE_UNROLL
            for (int j = 0; j < columns; j += 4) {
                const float* from = &sums[thread].at[i][j];
                float* const to =
                    values + Result::row(thread, i) * kStride + Result::column(thread, j);
                vector_at<Vector<float, 4>>(to) = {from[0], from[1], from[2], from[3]};
            }
        });
    }
};

// The same on tensor cores.
template <class Format, int kRows>
struct OnTensorCores {
    using Product = TensorProduct<Format, kRows>;
    using Coefficients = SplitMatrix;
    static constexpr int64_t kSharedBytes = Product::kSharedBytes;

    template <int kStride>
    static DOMERGE_DEVICE void run(Block<kBlockThreads>& block, const SplitMatrix& c,
                                   const Reader<Format>& a, int row, int column, float* values) {
        using Shape = typename Product::template Shape<false>;
        struct alignas(8) Pair {
            float at[2];
        };
        static_assert(kRows * kStride * sizeof(float) <= kSharedBytes - Product::kInverseBytes);
        const Product product(block.shared);
        typename Product::WarpSums sums;
        product.template run<false>(block, c, a, row, column, 1, sums,
                                    [](int, int, const typename Product::Sums&) {});
        block.warps([&](int warp) {
            const auto& found = sums[warp].at;
            lanes([&](int lane) {
                DOMERGE_UNROLL
                for (int i = 0; i < Shape::kDown; ++i) DOMERGE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int line = Shape::row(warp) + 16 * i + 8 * half + lane / 4;
                    const float inverse = product.inverse(line);
                    float* const to = values + line * kStride + Shape::column(warp) + lane % 4 * 2;
                    DOMERGE_UNROLL
                    for (int j = 0; j < Shape::kAcross; ++j) {
                        const auto& from = found[i * Shape::kAcross + j].of(lane);
                        vector_at<Pair>(to + 8 * j) = {from[2 * half] * inverse,
                                                       from[2 * half + 1] * inverse};
                    }
                }
            });
        });
    }
};

}  // namespace domerge
