#pragma once

#include <string>

namespace domerge {

// What the CUDA runtime finds here. `error` says why there are no devices; empty when there are.
// Versions as CUDA counts them: 1000 * major + 10 * minor; 0 when unknown.
struct CudaInfo {
    int devices;
    int driver;
    int runtime;
    std::string archs;
    std::string error;
};

CudaInfo cuda_info();

}  // namespace domerge
