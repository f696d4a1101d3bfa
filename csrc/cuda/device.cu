#include <cstdlib>

#include "block.h"
#include "launch.h"
#include "warp.h"

namespace domerge {

bool serves(const std::string& archs, int capability) {
    int newest = 0;
    bool portable = true;
    for (const char* at = archs.c_str(); *at != '\0'; at += *at == ';') {
        char* end;
        const int arch = static_cast<int>(std::strtol(at, &end, 10));
        const char letter = *end == 'a' || *end == 'f' ? *end++ : '\0';
        if (end == at || (*end != ';' && *end != '\0'))
            throw std::invalid_argument("no list of architectures: " + archs);
        if (arch == capability) return true;
        if (letter != 'a' && arch / 10 == capability / 10 && arch < capability) return true;
        if (arch > newest) {
            newest = arch;
            portable = letter == '\0';
        }
        at = end;
    }
    return portable && capability > newest;
}

#ifdef __CUDACC__

// Why the kernels run on none of the devices; empty where they do on one.
static std::string why_none_is_served(int devices) {
    std::string why;
    for (int i = 0; i < devices; ++i) {
        cudaDeviceProp found;
        check(cudaGetDeviceProperties(&found, i));
        if (serves(DOMERGE_CUDA_ARCHS, 10 * found.major + found.minor)) return "";
        why = std::string(found.name) + " has compute capability " + std::to_string(found.major) +
              "." + std::to_string(found.minor) + ", the kernels are built for " DOMERGE_CUDA_ARCHS;
    }
    return why;
}

CudaInfo cuda_info() {
    CudaInfo info{0, 0, 0, DOMERGE_CUDA_ARCHS, ""};
    cudaDriverGetVersion(&info.driver);
    cudaRuntimeGetVersion(&info.runtime);
    const cudaError_t status = cudaGetDeviceCount(&info.devices);
    if (status == cudaSuccess && info.devices > 0) {
        info.error = why_none_is_served(info.devices);
        return info;
    }
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

void set_shared_bytes(int64_t) {
    throw std::logic_error("the shared memory of a device is what it is");
}

void set_extra_bits(int) {
    throw std::logic_error("the tensor cores of a device add as they do");
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

void set_shared_bytes(int64_t value) {
    device.shared_bytes = value;
}

void set_extra_bits(int value) {
    extra_bits = value;
}

#endif

}  // namespace domerge
