// The descriptors of problems, from the bytes in which Python packs them.
#include <stdexcept>

#include "../packed.h"
#include "dispatch.h"

namespace domerge {

Problems::Problems(std::string_view addresses, std::string_view heads, std::string_view rows) {
    const size_t count = addresses.size() / sizeof(uint64_t);
    if (count != rows.size() / sizeof(Row))
        throw std::invalid_argument("one address a row is wanted");
    blocks_.reserve(count);
    for (size_t b = 0; b < count; ++b) {
        const auto row = nth<Row>(rows, b);
        blocks_.push_back(Block{at<const void>(nth<uint64_t>(addresses, b)), row.rank, row.pitch,
                                row.scale, static_cast<DType>(row.dtype)});
    }
    problems_.reserve(heads.size() / sizeof(Head));
    size_t first = 0;
    for (size_t p = 0; p < heads.size() / sizeof(Head); ++p) {
        const auto head = nth<Head>(heads, p);
        if (first + head.blocks > blocks_.size()) throw std::invalid_argument("too few rows");
        problems_.push_back(
            Problem{&blocks_[first], head.blocks, head.rank, head.d, head.columns != 0});
        first += head.blocks;
    }
}

}  // namespace domerge
