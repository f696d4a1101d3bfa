// Problems as algebra/side.py packs them into bytes: a head each, a row for each of their blocks.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

namespace domerge {

struct Head {
    int64_t blocks;
    int64_t rank;
    int64_t d;
    int64_t columns;
};

struct Row {
    int64_t rank;
    int64_t pitch;
    int64_t dtype;
    double scale;
};

// One of what lies in these bytes, one after the other.
template <class T>
T nth(std::string_view bytes, size_t k) {
    T found;
    std::memcpy(&found, bytes.data() + k * sizeof(T), sizeof(T));
    return found;
}

}  // namespace domerge
