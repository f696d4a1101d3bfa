#include "stop.h"

#include <ctime>

namespace domerge {

void (*check_signals)() = [] {};

namespace {

thread_local Polling* current = nullptr;

// A clock that costs little more than a call, as `poll` is called often.
int64_t milliseconds() {
#ifdef CLOCK_MONOTONIC_COARSE
    timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return now.tv_sec * int64_t{1000} + now.tv_nsec / 1000000;
#else
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
#endif
}

}  // namespace

Polling::Polling(const std::atomic<bool>& stop, bool caller)
    : stop_(stop), caller_(caller), next_(milliseconds() + kSignalPeriod.count()) {
    current = this;
}

Polling::~Polling() {
    current = nullptr;
}

void Polling::look() {
    if (stop_.load(std::memory_order_relaxed)) throw Stopped{};
    if (!caller_) return;
    const int64_t now = milliseconds();
    if (now < next_) return;
    next_ = now + kSignalPeriod.count();
    check_signals();
}

void poll() {
    if (current) current->look();
}

}  // namespace domerge
