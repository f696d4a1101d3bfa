// The AVX-512 kernels, with AMX for bfloat16 factors.
#define DOMERGE_ISA amx
#include "amx_apply.h"
#include "amx_factors.h"
#include "amx_gram.h"
#include "apply_decouple.h"
#include "factors.h"
#include "long_products.h"

namespace domerge {

namespace avx512 {
extern const Kernels kernels;
}

namespace amx {

namespace {

void gram(const Problem& problem, int64_t begin, int64_t end, bool first, float* sum,
          Arena& arena) {
    if (is_bfloat16(problem))
        gram_tiles(problem, begin, end, first, sum, arena);
    else
        avx512::kernels.gram(problem, begin, end, first, sum, arena);
}

const FactorKernels half = Factors<TileProducts>::kernels();
const LongKernels long_half = LongProducts<TileProducts, 2>::kernels();

bool suits_tiles(const ApplyItem& item) {
    return item.coefficients && is_bfloat16(*item.problem);
}

bool apply(const ApplyItem& item, Arena& arena) {
    return suits_tiles(item) ? apply_item<TileRowProduct, TileColumnProduct>(item, arena)
                             : avx512::kernels.apply(item, arena);
}

bool apply_decouple(const DecoupleItem& item, Arena& arena) {
    return suits_tiles(item.apply) ? apply_decouple_item<TileRowProduct>(item, arena)
                                   : avx512::kernels.apply_decouple(item, arena);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels changed = avx512::kernels;
        changed.name = "amx";
        changed.gram = gram;
        changed.apply = apply;
        changed.apply_decouple = apply_decouple;
        changed.half = &half;
        changed.long_half = &long_half;
        return changed;
    }();
    return table;
}

}  // namespace amx
}  // namespace domerge
