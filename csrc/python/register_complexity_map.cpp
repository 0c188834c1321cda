#include <pybind11/numpy.h>

#include <stdexcept>

#include "bindings.h"
#include "rsvlm/complexity_map.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

using Gray = py::array_t<std::uint8_t, py::array::c_style>;
using Mask = py::array_t<bool, py::array::c_style>;

py::array_t<double> run(const Gray& gray, const Mask& mask) {
    if (gray.ndim() != 2 || mask.ndim() != 2 || gray.shape(0) != mask.shape(0) || gray.shape(1) != mask.shape(1)) {
        throw std::invalid_argument("gray and mask must both be [H, W] of one shape; pass one validity flag per pixel");
    }
    py::array_t<double> tables({static_cast<py::ssize_t>(kComplexityChannels), gray.shape(0) + 1, gray.shape(1) + 1});
    const std::uint8_t* gray_ptr = gray.data();
    const auto* mask_ptr = reinterpret_cast<const std::uint8_t*>(mask.data());
    double* tables_ptr = tables.mutable_data();
    const std::int64_t height = gray.shape(0);
    const std::int64_t width = gray.shape(1);
    {
        py::gil_scoped_release release;
        complexity_map(gray_ptr, mask_ptr, height, width, tables_ptr);
    }
    return tables;
}

}  // namespace

void register_complexity_map(py::module_& module) {
    module.def("complexity_map", &run, py::kw_only(), py::arg("gray").noconvert(), py::arg("mask").noconvert(),
               "uint8 [H, W], bool [H, W] -> float64 [20, H + 1, W + 1]; see rsvlm_infer.ops.complexity_map.");
}

}  // namespace rsvlm::python
