// Products of bfloat16 panels on AMX tiles.
#pragma once

#include "amx_tiles.h"
#include "factor_blocks.h"
#include "half_products.h"

namespace domerge {
namespace DOMERGE_ISA {

struct TileProducts : HalfPanels {
    using Session = Tiles;

    // out [32, 32] = (first) or += left right over some units; a piece at `ahead`, if not null, is
    // fetched to L2 by the way.
    static DOMERGE_INLINE void multiply(const uint16_t* left, const uint16_t* right, int64_t units,
                                        float* out, int64_t ld, bool first, const void* ahead) {
        if (ahead)
            multiply_units<true>(left, right, units, out, ld, first, ahead);
        else
            multiply_units<false>(left, right, units, out, ld, first, ahead);
    }

 private:
    template <bool kAhead>
    static DOMERGE_INLINE void multiply_units(const uint16_t* left, const uint16_t* right,
                                              int64_t units, float* out, int64_t ld, bool first,
                                              const void* ahead) {
        constexpr int64_t kLine = 64, kLines = kPieceBytes / kStretch / kLine;
        const char* line = static_cast<const char*>(ahead);
        float* lower = out + kTile * ld;
        if (first) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, out, ld * 4);
            _tile_loadd(1, out + kTile, ld * 4);
            _tile_loadd(2, lower, ld * 4);
            _tile_loadd(3, lower + kTile, ld * 4);
        }
        for (int64_t u = 0; u < units; ++u, left += kUnitNumbers, right += kUnitNumbers) {
            _tile_loadd(6, right, 64);
            _tile_loadd(4, left, 64);
            _tile_loadd(7, right + kSquareNumbers, 64);
            _tile_loadd(5, left + kSquareNumbers, 64);
            if (kAhead) {
#pragma GCC unroll 8
                for (int k = 0; k < kLines; ++k) _mm_prefetch(line + k * kLine, _MM_HINT_T1);
                line += kLines * kLine;
            }
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, out, ld * 4);
        _tile_stored(1, out + kTile, ld * 4);
        _tile_stored(2, lower, ld * 4);
        _tile_stored(3, lower + kTile, ld * 4);
    }
};

}  // namespace DOMERGE_ISA
}  // namespace domerge
