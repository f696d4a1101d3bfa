// A kernel as explicit phases of one thread block, so that the same source runs on the host.
//
// A kernel is a struct with its Params (plain numbers and pointers), kThreads, kBlocksPerSm and
//     static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block);
// in which block.each([&](int thread) { ... }) is a phase: all threads run it, then all wait for
// each other. On the host a loop runs the threads one after the other, forwards or backwards: a
// result that depends on the direction is a race. Variables that live across phases are the same
// for all threads, or PerThread.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#define DOMERGE_DEVICE __device__ __forceinline__
#else
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#define DOMERGE_DEVICE inline
#endif

#include <stdexcept>
#include <string>

namespace domerge {

using Stream = uint64_t;  // a cudaStream_t as a number

#ifdef __CUDACC__

template <int kThreads>
struct Block {
    int64_t index;  // of this block in the grid
    char* shared;   // this block's shared memory, aligned to 16 bytes

    template <class Phase>
    DOMERGE_DEVICE void each(Phase phase) {
        phase(static_cast<int>(threadIdx.x));
        __syncthreads();
    }
};

// One T a thread, kept in registers.
template <class T, int kThreads>
struct PerThread {
    T value;
    DOMERGE_DEVICE T& operator[](int) { return value; }
};

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    enter(const __grid_constant__ typename Kernel::Params params) {
    extern __shared__ __align__(16) char shared[];
    Block<Kernel::kThreads> block{static_cast<int64_t>(blockIdx.x), shared};
    Kernel::run(params, block);
}

inline void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the runtime keeps the last error: do not leave it to the next caller
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

template <class Kernel>
void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Params& params,
            Stream stream) {
    if (blocks == 0) return;
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
    enter<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, shared_bytes,
                    reinterpret_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError());
}

#else

inline bool backwards = false;  // the order in which threads and blocks run

template <class Visit>
void in_order(int64_t count, Visit visit) {
    for (int64_t i = 0; i < count; ++i) visit(backwards ? count - 1 - i : i);
}

template <int kThreads>
struct Block {
    int64_t index;
    char* shared;

    template <class Phase>
    void each(Phase phase) {
        in_order(kThreads, [&](int64_t thread) { phase(static_cast<int>(thread)); });
    }
};

template <class T, int kThreads>
struct PerThread {
    std::vector<T> values = std::vector<T>(kThreads);
    T& operator[](int thread) { return values[thread]; }
};

// Every block finds its shared memory full of NaN, and not one byte longer than asked for.
template <class Kernel>
void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Params& params, Stream) {
    in_order(blocks, [&](int64_t index) {
        const std::unique_ptr<char, decltype(&std::free)> shared(
            static_cast<char*>(std::malloc(shared_bytes)), &std::free);
        std::memset(shared.get(), 0xff, shared_bytes);
        Block<Kernel::kThreads> block{index, shared.get()};
        Kernel::run(params, block);
    });
}

#endif

}  // namespace domerge
