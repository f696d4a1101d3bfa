#include "block.h"
#include "launch.h"

namespace domerge {

#ifdef __CUDACC__

CudaInfo cuda_info() {
    CudaInfo info{0, 0, 0, DOMERGE_CUDA_ARCHS, ""};
    cudaDriverGetVersion(&info.driver);
    cudaRuntimeGetVersion(&info.runtime);
    const cudaError_t status = cudaGetDeviceCount(&info.devices);
    if (status == cudaSuccess && info.devices > 0) return info;
    info.devices = 0;
    if (info.driver == 0)
        info.error = "CUDA driver is missing";
    else if (status == cudaSuccess)
        info.error = "no CUDA device";
    else
        info.error = cudaGetErrorString(status);
    cudaGetLastError();  // the runtime keeps the last error: do not leave it to the next caller
    return info;
}

bool on_host() {
    return false;
}

void set_backwards(bool) {
    throw std::logic_error("the threads of a device have no order");
}

#else

CudaInfo cuda_info() {
    return CudaInfo{0, 0, 0, "", "compiled for the host"};
}

bool on_host() {
    return true;
}

void set_backwards(bool value) {
    backwards = value;
}

#endif

}  // namespace domerge
