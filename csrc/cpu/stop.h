// How a call ends early: one thread finds a reason, the others find out where they `poll`.
#pragma once

#include <atomic>
#include <chrono>

#include "kernels.h"

namespace domerge {

// Throws what a signal raises in the thread that made the call; set by the bindings.
extern void (*check_signals)();

// Thrown by `poll` where another thread has the reason.
struct Stopped {};

// While it lives, `poll` in this thread looks at the flag and, in the thread that made the call, at
// signals.
class Polling {
 public:
    Polling(const std::atomic<bool>& stop, bool caller);
    ~Polling();
    Polling(const Polling&) = delete;
    Polling& operator=(const Polling&) = delete;
    void look();

 private:
    const std::atomic<bool>& stop_;
    const bool caller_;
    int64_t next_;  // when to look at signals again, in milliseconds
};

constexpr std::chrono::milliseconds kSignalPeriod{50};

}  // namespace domerge
