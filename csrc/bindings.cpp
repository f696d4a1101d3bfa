// Names to functions. Addresses are integers; the caller has checked shapes, dtypes and devices and
// keeps the memory alive. Lists of 8-byte numbers are handed over as such, or as a buffer of them.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "columns.h"
#include "cpu/dispatch.h"
#include "cpu/stop.h"
#include "grams.h"
#include "launches.h"
#include "places.h"

namespace py = pybind11;

namespace pybind11::detail {

template <class T>
struct numbers_caster : list_caster<std::vector<T>, T> {
    bool load(handle source, bool convert) {
        if (PyObject_CheckBuffer(source.ptr()) == 0)
            return list_caster<std::vector<T>, T>::load(source, convert);
        Py_buffer given;
        if (PyObject_GetBuffer(source.ptr(), &given, PyBUF_SIMPLE) != 0) throw error_already_set();
        const bool wide = given.itemsize == sizeof(T) || given.itemsize == 1;  // or of bytes
        const bool whole = wide && given.len % sizeof(T) == 0;
        this->value.resize(given.len / sizeof(T));
        if (whole && given.len > 0) std::memcpy(this->value.data(), given.buf, given.len);
        PyBuffer_Release(&given);
        return whole;
    }
};

template <>
struct type_caster<std::vector<uint64_t>> : numbers_caster<uint64_t> {};
template <>
struct type_caster<std::vector<int64_t>> : numbers_caster<int64_t> {};
template <>
struct type_caster<std::vector<double>> : numbers_caster<double> {};

}  // namespace pybind11::detail

// Whether the call in this thread comes from the one in which Python answers signals. Others have
// nothing to ask for, and must not wait for the GIL while the interpreter ends.
thread_local bool answers_signals = false;

bool in_main_thread() {
    const py::object threading = py::module_::import("threading");
    return threading.attr("get_ident")().equal(threading.attr("main_thread")().attr("ident"));
}

void raise_signals() {
    if (!answers_signals) return;
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// f(kernels, arguments...) without the GIL. The kernels are chosen while it is held: reading the
// environment must not race with Python writing it.
template <class Result, class... Args>
auto on_cpu(Result (*f)(const domerge::Kernels&, Args...)) {
    return [f](Args... args) {
        const domerge::Kernels& kernels = domerge::choose_kernels();
        answers_signals = in_main_thread();
        const py::gil_scoped_release release;
        return f(kernels, args...);
    };
}

void bind_launch_tables(py::module_& m) {
    using domerge::LaunchTables;
    py::class_<LaunchTables>(m, "LaunchTables", py::buffer_protocol())
        .def(py::init<>())
        .def_buffer([](LaunchTables& x) {
            const LaunchTables::Numbers& found = x.finished();
            // Not to be written to, but torch warns of what cannot be.
            return py::buffer_info(const_cast<int64_t*>(found.data()), found.size());
        })
        .def_property_readonly("places", &LaunchTables::places)
        .def_property_readonly("blocks", &LaunchTables::blocks)
        .def_property_readonly("largest_rank", &LaunchTables::largest_rank)
        .def("add", &LaunchTables::add)
        .def("describe", &LaunchTables::describe)
        .def("gram", &LaunchTables::gram)
        .def("block_gram", &LaunchTables::block_gram)
        .def("orthogonalize", &LaunchTables::orthogonalize)
        .def("coefficients", &LaunchTables::coefficients)
        .def("part_numbers", &LaunchTables::part_numbers)
        .def("split", &LaunchTables::split)
        .def("apply", &LaunchTables::apply)
        .def("roots", &LaunchTables::roots)
        .def("apply_decouple", &LaunchTables::apply_decouple)
        .def("largest", &LaunchTables::largest)
        .def("block_largest", &LaunchTables::block_largest);
}

PYBIND11_MODULE(_C, m) {
    domerge::check_signals = raise_signals;
    py::class_<domerge::Problems>(m, "Problems")
        .def(py::init<std::string_view, std::string_view, std::string_view>(), py::arg("addresses"),
             py::arg("heads"), py::arg("rows"));
    bind_launch_tables(m);
    m.def("cut", domerge::cut);
    m.def("by_number", domerge::by_number);
    m.def("within", domerge::within);
    m.def("norms_apart", domerge::norms_apart);
    m.def("over_products", domerge::over_products);
    m.def("places", domerge::places);
    m.def("places_in_turn", domerge::places_in_turn);
    m.def("spread", domerge::spread);
    m.def("isa", [] { return std::string(domerge::choose_kernels().name); });
    m.def("isas", domerge::supported_isas);
    m.def("gram", on_cpu(domerge::gram));
    m.def("block_gram", on_cpu(domerge::block_gram));
    m.def("orthogonalize", on_cpu(domerge::orthogonalize));
    m.def("orthogonalize_factors", on_cpu(domerge::orthogonalize_factors));
    m.def("half_products", on_cpu(domerge::half_products));
    m.def("long_product", on_cpu(domerge::long_product));
    m.def("half_long_products", on_cpu(domerge::half_long_products));
    m.def("apply", on_cpu(domerge::apply));
    m.def("apply_decouple", on_cpu(domerge::apply_decouple));
    m.def("block_products", on_cpu(domerge::block_products));
    m.def("largest", on_cpu(domerge::largest));
    m.def("block_largest", on_cpu(domerge::block_largest));
    m.def("entry_counts", on_cpu(domerge::entry_counts));
    m.def("entry_sums", on_cpu(domerge::entry_sums));
    m.def("entry_merge", on_cpu(domerge::entry_merge));
}
