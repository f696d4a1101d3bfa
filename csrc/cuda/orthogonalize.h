#pragma once

#include <vector>

#include "types.h"

namespace domerge {

// The sizes, rising, that R is padded to.
std::vector<int64_t> orthogonalize_sizes();

// Bytes that a launch on the current device needs in `scratch`, aligned to 16.
int64_t orthogonalize_scratch(int64_t size, int64_t problems, bool frobenius);

// C of every problem, by the rule of csrc/cpu/orthogonalize.h, in one launch.
// work [problems, 6]: address of G (float32 [R, R]), R <= size, T, position in starts of its T + 1
// entries (the first row of each adapter, then R), offset of C in out, row of stats [., 5].
void orthogonalize(int64_t size, Address work, int64_t problems, Address starts, Address out,
                   Address stats, Address scratch, bool frobenius, double gamma, int64_t steps,
                   double tol, Stream stream);

}  // namespace domerge
