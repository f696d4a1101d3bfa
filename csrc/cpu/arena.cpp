#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

namespace domerge {

namespace {

constexpr size_t kAlignment = 64;

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
        void* data = std::aligned_alloc(kAlignment, bytes);
        if (!data) throw std::bad_alloc();
        buffers.push_back(Buffer{static_cast<char*>(data), bytes, 0});
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
    size_t total = 0;
    for (Buffer& buffer : state_->buffers) {
        total += buffer.size;
        buffer.used = 0;
    }
    if (state_->buffers.size() > 1) {
        state_->clear();
        state_->add(total);
    }
}

void* Arena::take(size_t bytes) {
    const size_t size = (bytes / kAlignment + 1) * kAlignment;
    if (state_->buffers.empty() || state_->buffers.back().size - state_->buffers.back().used < size)
        state_->add(size < (1u << 16) ? (1u << 16) : size);
    Buffer& buffer = state_->buffers.back();
    void* piece = buffer.data + buffer.used;
    buffer.used += size;
    return piece;
}

}  // namespace domerge
