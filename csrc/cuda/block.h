// A kernel as explicit phases of one thread block, so that the same source runs on the host.
//
// A kernel is a struct with its Params (plain numbers and pointers), kThreads, kBlocksPerSm and
//     static DOMERGE_DEVICE void run(const Params& params, Block<kThreads>& block);
// in which block.each([&](int thread) { ... }) is a phase: all threads run it, then all wait for
// each other. On the host a loop runs the threads one after the other, forwards or backwards: a
// result that depends on the direction is a race. Variables that live across phases are the same
// for all threads, or PerThread, or PerWarp.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#define DOMERGE_DEVICE __device__ __forceinline__
#define DOMERGE_UNROLL _Pragma("unroll")
#define DOMERGE_ROLLED _Pragma("unroll 1")
#else
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#define DOMERGE_DEVICE inline
#define DOMERGE_UNROLL
#define DOMERGE_ROLLED
#endif

#include <stdexcept>
#include <string>

#include "types.h"

namespace domerge {

// What a kernel may know of the device that is current.
struct Device {
    int64_t multiprocessors;
    int64_t shared_bytes;  // the most that one block may have
};

// Shared memory that a block may have on every device of compute capability 8.0 and later.
constexpr int64_t kSmallestShared = 99 << 10;

inline void check_blocks(int64_t blocks) {
    if (blocks > INT32_MAX) throw std::length_error("more than 2^31 - 1 thread blocks in a launch");
}

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

    // A phase of warps: what all lanes of one do together (warp.h).
    template <class Phase>
    DOMERGE_DEVICE void warps(Phase phase) {
        phase(static_cast<int>(threadIdx.x / 32));
        __syncthreads();
    }
};

// The number, of unknown origin to the compiler: what a phase derives from it is not kept in
// registers for the next one.
DOMERGE_DEVICE int opaque(int number) {
    asm volatile("" : "+r"(number));
    return number;
}

// Adds to a number that other threads and blocks may add to as well. For integers: the order of
// additions, which differs from run to run, would show in a sum of floats.
DOMERGE_DEVICE void add_atomically(uint32_t* to, uint32_t number) {
    atomicAdd(to, number);
}
DOMERGE_DEVICE void add_atomically(uint64_t* to, uint64_t number) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(number));
}

// Raises a number to another one, where it is less.
DOMERGE_DEVICE void raise_atomically(uint32_t* to, uint32_t number) {
    atomicMax(to, number);
}

// One T a thread, kept in registers.
template <class T, int kThreads>
struct PerThread {
    T value;
    DOMERGE_DEVICE T& operator[](int) { return value; }
};

// One T a warp, which is in its lanes' registers.
template <class T, int kThreads>
struct PerWarp {
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

inline Device current_device() {
    int device, multiprocessors, shared_bytes;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return {multiprocessors, shared_bytes};
}

template <class Kernel>
void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Params& params,
            Stream stream) {
    if (blocks == 0) return;
    check_blocks(blocks);
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(enter<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared_bytes)));
    enter<Kernel><<<static_cast<unsigned>(blocks), Kernel::kThreads, shared_bytes,
                    reinterpret_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError());
}

#else

inline bool backwards = false;       // the order in which threads and blocks run
inline Device device{2, 163 << 10};  // what current_device finds; tests change it

inline Device current_device() {
    return device;
}

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

    template <class Phase>
    void warps(Phase phase) {
        in_order(kThreads / 32, [&](int64_t warp) { phase(static_cast<int>(warp)); });
    }
};

inline int opaque(int number) {
    return number;
}

template <class T>
void add_atomically(T* to, T number) {
    *to += number;
}

inline void raise_atomically(uint32_t* to, uint32_t number) {
    if (number > *to) *to = number;
}

// Full of NaN at first, as registers may be of anything.
template <class T, int kThreads>
struct PerThread {
    static_assert(std::is_trivially_copyable_v<T>);
    std::vector<T> values = std::vector<T>(kThreads);

    PerThread() { std::memset(static_cast<void*>(values.data()), 0xff, kThreads * sizeof(T)); }
    T& operator[](int thread) { return values[thread]; }
};

template <class T, int kThreads>
using PerWarp = PerThread<T, kThreads / 32>;

// Every block finds its shared memory full of NaN, and not one byte longer than asked for.
template <class Kernel>
void launch(int64_t blocks, int64_t shared_bytes, const typename Kernel::Params& params, Stream) {
    check_blocks(blocks);
    if (shared_bytes > device.shared_bytes) throw std::length_error("too much shared memory");
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
