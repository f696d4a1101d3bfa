#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.h"

namespace domerge {

// Runs body(item, arena) for item = 0 .. count - 1. Threads take the next item from a counter, so
// put the largest first. What an item writes must not depend on who runs it. The first exception
// stops the rest and is rethrown here.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_lock;
    const auto work = [&] {
        try {
            Arena arena;
            for (int64_t item; (item = next++) < count;) {
                arena.reset();
                body(item, arena);
            }
        } catch (...) {
            next = count;
            const std::lock_guard<std::mutex> guard(error_lock);
            if (!error) error = std::current_exception();
        }
    };
    struct Joiner {
        std::vector<std::thread> threads;
        ~Joiner() {
            for (std::thread& thread : threads) thread.join();
        }
    };
    {
        Joiner joiner;
        for (int64_t i = 1; i < threads && i < count; ++i) joiner.threads.emplace_back(work);
        work();
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace domerge
