// The AVX-512 kernels, with dot products of bfloat16 numbers for descents on the factors.
#define DOMERGE_ISA avx512_bf16
#include "dot_factors.h"
#include "factors.h"

namespace domerge {

namespace avx512 {
extern const Kernels kernels;
}

namespace avx512_bf16 {

namespace {

const FactorKernels half = Factors<DotProducts>::kernels();

}  // namespace

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels changed = avx512::kernels;
        changed.name = "avx512_bf16";
        changed.half = &half;
        return changed;
    }();
    return table;
}

}  // namespace avx512_bf16
}  // namespace domerge
