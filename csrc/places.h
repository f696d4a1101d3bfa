// Where tensors of Python's lie: asked through the exchange API of DLPack 1.2, a C structure that a
// framework's tensor type carries (https://dmlc.github.io/dlpack). A question takes a tenth of what
// an attribute takes of a tensor in Python.
#pragma once

#include <pybind11/pybind11.h>

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

// The addresses of row-major matrices as bytes; None unless all are tensors of one of the types and
// such matrices, and, but for width 0, lie on one device and are each like the one `width` before.
inline pybind11::object places(const pybind11::capsule& api, const pybind11::tuple& types,
                               const pybind11::list& tensors, size_t width) {
    const auto* exchange = static_cast<const DlExchange*>(api.get_pointer());
    if (exchange->version.major != 1 || exchange->from_object == nullptr)
        throw std::invalid_argument("DLPack's exchange API of version 1 is wanted");
    std::vector<uint64_t> found;
    std::vector<Place> seen;
    found.reserve(tensors.size());
    seen.reserve(width);
    for (const pybind11::handle x : tensors) {
        bool known = false;
        for (const pybind11::handle type : types)
            known = known || reinterpret_cast<PyObject*>(Py_TYPE(x.ptr())) == type.ptr();
        if (!known) return pybind11::none();
        DlTensor tensor;
        if (exchange->from_object(x.ptr(), &tensor) != 0) throw pybind11::error_already_set();
        if (!row_major(tensor)) return pybind11::none();
        const Place place{tensor.shape[0], tensor.shape[1], tensor.device, tensor.dtype};
        const size_t k = found.size();
        if (k < width) {
            seen.push_back(place);
            if (!place.on(seen[0].device)) return pybind11::none();
        } else if (width > 0 && !(place == seen[k % width])) {
            return pybind11::none();
        }
        found.push_back(reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset);
    }
    return pybind11::bytes(reinterpret_cast<const char*>(found.data()),
                           found.size() * sizeof(uint64_t));
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
