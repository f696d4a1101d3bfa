// The AVX-512 kernels, with AMX where it pays.
#define DOMERGE_ISA amx
#include "amx.h"

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

}  // namespace

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels changed = avx512::kernels;
        changed.name = "amx";
        changed.gram = gram;
        return changed;
    }();
    return table;
}

}  // namespace amx
}  // namespace domerge
