// Included once by each kernels_<isa>.cpp, after it defines DOMERGE_ISA.
#pragma once

#include "apply_decouple.h"
#include "block_products.h"
#include "entries.h"
#include "factor_products.h"
#include "factors.h"
#include "gram.h"
#include "largest.h"
#include "long_products.h"
#include "orthogonalize.h"

#define DOMERGE_STRING_(x) #x
#define DOMERGE_STRING(x) DOMERGE_STRING_(x)

namespace domerge {
namespace DOMERGE_ISA {

const FactorKernels single = Factors<SingleProducts>::kernels();
const LongKernels long_single = LongProducts<SingleProducts, 1>::kernels();

extern const Kernels kernels;
const Kernels kernels = {
    DOMERGE_STRING(DOMERGE_ISA),
    gram_chunk<float>,
    gram_chunk<double>,
    orthogonalize_item,
    apply_item<RowProduct, ColumnProduct>,
    apply_decouple_item<RowProduct>,
    root_rows,
    root_stride,
    make_root,
    block_products,
    largest,
    entry_counts,
    entry_sums,
    entry_merge,
    &single,
    nullptr,
    &long_single,
    nullptr,
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
