#pragma once

#include <cstdint>

namespace domerge {

using Address = uint64_t;  // a pointer to device memory as a number
using Stream = uint64_t;   // a cudaStream_t as a number

}  // namespace domerge
