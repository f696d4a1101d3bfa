// Where tensors of Python's lie: asked through the exchange API of DLPack 1.2, a C structure that a
// framework's tensor type carries (https://dmlc.github.io/dlpack). A question takes a tenth of what
// an attribute takes of a tensor in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace domerge {

struct DlDevice {
    int32_t type;
    int32_t id;
};

struct DlDtype {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t dimensions;
    DlDtype dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct DlExchange {
    struct {
        uint32_t major;
        uint32_t minor;
    } version;
    void* older;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*from_object)(void* object, DlTensor* out);  // nothing is kept alive, or waited for
    void* stream;
};

// A matrix, as far as others are to be like it.
struct Place {
    int64_t rows;
    int64_t columns;
    DlDevice device;
    DlDtype dtype;

    bool operator==(const Place& x) const {
        return rows == x.rows && columns == x.columns && on(x.device) &&
               dtype.code == x.dtype.code && dtype.bits == x.dtype.bits;
    }
    bool on(const DlDevice& x) const { return device.type == x.type && device.id == x.id; }
};

// A matrix with all numbers of a row next to each other, and the rows.
inline bool row_major(const DlTensor& x) {
    if (x.dimensions != 2 || x.shape[0] < 1 || x.shape[1] < 1) return false;
    return (x.shape[1] == 1 || x.strides[1] == 1) &&
           (x.shape[0] == 1 || x.strides[0] == x.shape[1]);
}

// Takes matrices one after the other, and where they lie. width: each is to be on one device, and
// like the one `width` before; 0: none is.
class Places {
 public:
    Places(const pybind11::capsule& api, const pybind11::tuple& types, size_t width)
        : exchange_(static_cast<const DlExchange*>(api.get_pointer())), width_(width) {
        if (exchange_->version.major != 1 || exchange_->from_object == nullptr)
            throw std::invalid_argument("DLPack's exchange API of version 1 is wanted");
        for (const pybind11::handle type : types) types_.push_back(type.ptr());
    }

    void reserve(size_t count) { found_.reserve(count); }

    // Whether it is a tensor of one of the types, and such a matrix.
    bool take(PyObject* x) {
        const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        if (std::find(types_.begin(), types_.end(), type) == types_.end()) return false;
        DlTensor tensor;
        if (exchange_->from_object(x, &tensor) != 0) throw pybind11::error_already_set();
        if (!row_major(tensor) || !fits(tensor)) return false;
        found_.push_back(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
        return true;
    }

    pybind11::bytes bytes() const {
        return pybind11::bytes(reinterpret_cast<const char*>(found_.data()),
                               found_.size() * sizeof(uint64_t));
    }

 private:
    bool fits(const DlTensor& x) {
        if (width_ == 0) return true;
        const Place place{x.shape[0], x.shape[1], x.device, x.dtype};
        if (found_.size() >= width_) return place == seen_[found_.size() % width_];
        seen_.push_back(place);
        return place.on(seen_[0].device);
    }

    const DlExchange* exchange_;
    size_t width_;
    std::vector<const PyObject*> types_;
    std::vector<uint64_t> found_;
    std::vector<Place> seen_;
};

// The addresses of row-major matrices as bytes; None unless all are tensors of one of the types and
// such matrices, and, but for width 0, lie on one device and are each like the one `width` before.
inline pybind11::object places(const pybind11::capsule& api, const pybind11::tuple& types,
                               const pybind11::list& tensors, size_t width) {
    Places found(api, types, width);
    found.reserve(tensors.size());
    for (const pybind11::handle x : tensors)
        if (!found.take(x.ptr())) return pybind11::none();
    return found.bytes();
}

// `places` of what several lists have at these positions, of one position after the other.
inline pybind11::object places_in_turn(const pybind11::capsule& api, const pybind11::tuple& types,
                                       const std::vector<pybind11::list>& columns,
                                       const std::vector<int64_t>& at) {
    Places found(api, types, columns.size());
    found.reserve(at.size() * columns.size());
    for (const int64_t k : at)
        for (const pybind11::list& column : columns) {
            PyObject* x = PyList_GetItem(column.ptr(), k);
            if (x == nullptr) throw pybind11::error_already_set();
            if (!found.take(x)) return pybind11::none();
        }
    return found.bytes();
}

// First, step, and how many.
using Run = std::tuple<uint64_t, int64_t, int64_t>;

// The numbers of one run after the other as bytes, each with all of `inner` added to it.
inline pybind11::bytes spread(const std::vector<Run>& runs, const std::vector<int64_t>& inner) {
    int64_t size = 0;
    for (const auto& [first, step, count] : runs) size += count;
    std::vector<uint64_t> found;
    found.reserve(size * inner.size());
    for (const auto& [first, step, count] : runs)
        for (int64_t k = 0; k < count; ++k)
            for (const int64_t more : inner) found.push_back(first + k * step + more);
    return pybind11::bytes(reinterpret_cast<const char*>(found.data()),
                           found.size() * sizeof(uint64_t));
}

}  // namespace domerge
