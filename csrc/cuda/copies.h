// Copies from global to shared memory that a thread starts, and waits for later.
#pragma once

#include "block.h"
#ifndef __CUDACC__
#include <deque>
#endif

namespace domerge {

#ifdef __CUDACC__

template <int kThreads>
struct Copies {
    // kBytes at an address that is a multiple of it: `valid` of them are read, the rest is zero.
    template <int kBytes>
    DOMERGE_DEVICE void start(int, void* to, const void* from, int valid) {
        const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
        if constexpr (kBytes == 16)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from),
                         "r"(valid)
                         : "memory");
        else
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from),
                         "n"(kBytes), "r"(valid)
                         : "memory");
    }

    // What was started since the last call is a group.
    DOMERGE_DEVICE void commit(int) { asm volatile("cp.async.commit_group;" ::: "memory"); }

    // All groups but the last kPending have arrived; for other threads after the phase.
    template <int kPending>
    DOMERGE_DEVICE void wait(int) {
        asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
    }
};

#else

// They arrive as late as may be; until then NaN is there.
template <int kThreads>
class Copies {
 public:
    ~Copies() {
        for (const auto& groups : groups_)
            if (!groups.empty()) std::abort();  // it would write into what others use
    }

    template <int kBytes>
    void start(int thread, void* to, const void* from, int valid) {
        if (valid < 0 || valid > kBytes) std::abort();
        if ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % kBytes != 0)
            std::abort();
        std::memset(to, 0xff, kBytes);
        open_[thread].push_back({to, from, valid, kBytes});
    }

    void commit(int thread) { groups_[thread].push_back(std::move(open_[thread])); }

    template <int kPending>
    void wait(int thread) {
        for (auto& groups = groups_[thread]; groups.size() > kPending; groups.pop_front()) {
            for (const Copy& copy : groups.front()) {
                std::memset(copy.to, 0, copy.bytes);
                if (copy.valid > 0) std::memcpy(copy.to, copy.from, copy.valid);
            }
        }
    }

 private:
    struct Copy {
        void* to;
        const void* from;
        int valid;
        int bytes;
    };
    std::vector<std::vector<Copy> > open_ = std::vector<std::vector<Copy> >(kThreads);
    std::vector<std::deque<std::vector<Copy> > > groups_ =
        std::vector<std::deque<std::vector<Copy> > >(kThreads);
};

#endif

}  // namespace domerge
