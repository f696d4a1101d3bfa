#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace domerge {

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kSmallest = 1u << 16;
constexpr size_t kHugePage = 2u << 20;

struct Buffer {
    char* data;
    size_t size;
    size_t used;
};

}  // namespace

struct Arena::State {
    std::vector<Buffer> buffers;

    void add(size_t bytes) {
        buffers.reserve(buffers.size() + 1);
        const bool huge = bytes >= kHugePage;
        if (huge) bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
        void* data = std::aligned_alloc(huge ? kHugePage : kAlignment, bytes);
        if (!data) throw std::bad_alloc();
#ifdef __linux__
        // Only advice: a panel of a large matrix touches more small pages than the TLB holds.
        if (huge) madvise(data, bytes, MADV_HUGEPAGE);
#endif
        buffers.push_back(Buffer{static_cast<char*>(data), bytes, 0});
    }

    size_t size() const {
        size_t total = 0;
        for (const Buffer& buffer : buffers) total += buffer.size;
        return total;
    }

    void clear() {
        for (const Buffer& buffer : buffers) std::free(buffer.data);
        buffers.clear();
    }
};

Arena::Arena() : state_(new State) {}

Arena::~Arena() {
    state_->clear();
    delete state_;
}

// Several buffers become one, so that the next use of the same size fits into one.
void Arena::reset() {
    for (Buffer& buffer : state_->buffers) buffer.used = 0;
    if (state_->buffers.size() > 1) {
        const size_t total = state_->size();
        state_->clear();
        state_->add(total);
    }
}

void* Arena::take(size_t bytes) {
    const size_t size = (bytes / kAlignment + 1) * kAlignment;
    if (state_->buffers.empty() || state_->buffers.back().size - state_->buffers.back().used < size)
        state_->add(std::max({size, kSmallest, state_->size()}));
    Buffer& buffer = state_->buffers.back();
    void* piece = buffer.data + buffer.used;
    buffer.used += size;
    return piece;
}

}  // namespace domerge
