// What the products on AMX tiles share. A tile product adds rows of 32 bfloat16 numbers times rows
// of 16 pairs of them to 16 x 16 float32 sums.
#pragma once

#include <immintrin.h>

#include "kernels.h"
#include "load.h"

namespace domerge {
namespace DOMERGE_ISA {

constexpr int64_t kTile = 16;           // rows of a tile
constexpr int64_t kSquare = 2 * kTile;  // 2 x 2 tiles of sums
constexpr int64_t kDepth = 32;          // numbers of a tile's row

// Sets this thread's tiles up while it lives.
class Tiles {
 public:
    Tiles() {
        alignas(64) uint8_t config[64] = {1};
        for (int tile = 0; tile < 8; ++tile) {
            config[16 + 2 * tile] = 64;  // bytes of a row
            config[48 + tile] = kTile;
        }
        // GCC's intrinsic tells the compiler of 8 of the 64 bytes it reads.
        asm volatile("" : : "r"(config) : "memory");
        _tile_loadconfig(config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

inline bool is_bfloat16(const Problem& problem) {
    for (int64_t b = 0; b < problem.count; ++b)
        if (problem.blocks[b].dtype != DType::bfloat16) return false;
    return true;
}

}  // namespace DOMERGE_ISA
}  // namespace domerge
