// Names to launches. Addresses and streams are integers; the caller has checked shapes, dtypes and
// devices, keeps the memory alive and has made the device current.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "descent_tiles.h"
#include "launch.h"
#include "orthogonalize.h"

namespace py = pybind11;

static py::dict info() {
    const domerge::CudaInfo info = domerge::cuda_info();
    py::dict result;
    result["devices"] = info.devices;
    result["driver"] = info.driver;
    result["runtime"] = info.runtime;
    result["archs"] = info.archs;
    result["error"] = info.error;
    return result;
}

PYBIND11_MODULE(_cuda, m) {
    using Unlocked = py::call_guard<py::gil_scoped_release>;
    m.attr("ON_HOST") = domerge::on_host();
    m.def("info", info);
    m.def("serves", domerge::serves);
    m.def("set_backwards", domerge::set_backwards);
    m.def("set_shared_bytes", domerge::set_shared_bytes);
    m.def("set_extra_bits", domerge::set_extra_bits);
    m.def("gram_sizes", domerge::gram_sizes);
    m.def("orthogonalize_sizes", domerge::orthogonalize_sizes);
    m.def("apply_sizes", domerge::apply_sizes);
    m.def("apply_decouple_sizes", domerge::apply_decouple_sizes);
    m.def("apply_columns", domerge::apply_columns);
    m.def("apply_decouple_columns", domerge::apply_decouple_columns);
    m.def("orthogonalize_scratch", domerge::orthogonalize_scratch);
    m.def("apply_decouple_scratch", domerge::apply_decouple_scratch);
    py::class_<domerge::Decoupling>(m, "Decoupling")
        .def(py::init([](domerge::Address work, domerge::Address offsets, domerge::Address roots,
                         domerge::Address norms, domerge::Address omegas, double scale,
                         domerge::Address energies, int64_t slots, domerge::Address scratch) {
                 return domerge::Decoupling{work,  offsets,  roots, norms,  omegas,
                                            scale, energies, slots, scratch};
             }),
             py::arg("work"), py::arg("offsets"), py::arg("roots"), py::arg("norms"),
             py::arg("omegas"), py::arg("scale"), py::arg("energies"), py::arg("slots"),
             py::arg("scratch"));
    m.def("gram", domerge::gram, Unlocked());
    m.def("block_gram", domerge::block_gram, Unlocked());
    m.def("orthogonalize", domerge::orthogonalize, Unlocked());
    m.def("tiled_descent_bytes", domerge::tiled_descent_bytes);
    py::class_<domerge::TiledDescent>(m, "TiledDescent")
        .def(py::init([](int64_t size, domerge::Address work, int64_t problems,
                         domerge::Address starts, domerge::Address memory, int64_t each,
                         domerge::Address out, domerge::Address stats, bool frobenius, double gamma,
                         double tol) {
                 return domerge::TiledDescent{size, work,  problems,  starts, memory, each,
                                              out,  stats, frobenius, gamma,  tol};
             }),
             py::arg("size"), py::arg("work"), py::arg("problems"), py::arg("starts"),
             py::arg("memory"), py::arg("each"), py::arg("out"), py::arg("stats"),
             py::arg("frobenius"), py::arg("gamma"), py::arg("tol"))
        .def("begin", &domerge::TiledDescent::begin, Unlocked())
        .def("step", &domerge::TiledDescent::step, Unlocked())
        .def("finish", &domerge::TiledDescent::finish, Unlocked());
    m.def("takes_parts", domerge::takes_parts);
    m.def("split_rows", domerge::split_rows);
    m.def("split_numbers", domerge::split_numbers);
    m.def("split", domerge::split, Unlocked());
    m.def("apply", domerge::apply, Unlocked());
    m.def("roots", domerge::roots, Unlocked());
    m.def("apply_decouple", domerge::apply_decouple, Unlocked());
    m.def("largest", domerge::largest, Unlocked());
    py::class_<domerge::UpdateNumbers>(m, "Updates")
        .def(py::init([](domerge::Address rows, int64_t adapters, int64_t m, int64_t n) {
                 return domerge::UpdateNumbers{rows, adapters, m, n};
             }),
             py::arg("rows"), py::arg("adapters"), py::arg("m"), py::arg("n"));
    m.def("entry_counts", domerge::entry_counts, Unlocked());
    m.def("entry_sums", domerge::entry_sums, Unlocked());
    m.def("entry_merge", domerge::entry_merge, Unlocked());
}
