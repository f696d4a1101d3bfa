#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "stop.h"

namespace domerge {

// The threads that share a call's items, besides the one that made the call.
class Crew {
 public:
    // Starts `work` in as many threads as can be had: whoever made the call works anyway.
    template <class Work>
    void start(int64_t count, const Work& work) {
        try {
            while (static_cast<int64_t>(threads_.size()) < count) {
                threads_.emplace_back([this, &work] {
                    work();
                    const std::lock_guard<std::mutex> guard(lock_);
                    ++finished_;
                    changed_.notify_one();
                });
            }
        } catch (const std::system_error&) {
        } catch (const std::bad_alloc&) {
        }
    }

    // Whether all have finished, after waiting for a while.
    bool wait(std::chrono::milliseconds most) {
        std::unique_lock<std::mutex> guard(lock_);
        return changed_.wait_for(guard, most, [&] { return finished_ == threads_.size(); });
    }

    ~Crew() {
        for (std::thread& thread : threads_) thread.join();
    }

 private:
    std::vector<std::thread> threads_;
    std::mutex lock_;
    std::condition_variable changed_;
    size_t finished_ = 0;
};

// Runs body(item, arena) for item = 0 .. count - 1. Threads take the next item from a counter, so
// put the largest first. What an item writes must not depend on who runs it. The first exception,
// of an item or of a signal, stops the rest and is rethrown here when no thread works any more.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> stop{false};
    std::exception_ptr error;
    std::mutex error_lock;
    const auto guarded = [&](const auto& part) {
        try {
            part();
        } catch (const Stopped&) {
        } catch (...) {
            const std::lock_guard<std::mutex> guard(error_lock);
            if (!error) error = std::current_exception();
            stop = true;
        }
    };
    const auto work = [&](bool caller) {
        guarded([&] {
            const Polling polling(stop, caller);
            Arena arena;
            for (int64_t item; (item = next++) < count;) {
                poll();
                arena.reset();
                body(item, arena);
            }
        });
    };
    const auto help = [&] { work(false); };
    {
        Crew crew;
        crew.start((threads < count ? threads : count) - 1, help);
        work(true);
        while (!crew.wait(kSignalPeriod)) guarded([] { check_signals(); });
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace domerge
