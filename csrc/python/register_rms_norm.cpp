#include "bindings.h"
#include "pointers.h"
#include "rsvlm/rms_norm.h"

namespace py = pybind11;

namespace rsvlm::python {

void register_rms_norm(py::module_& module) {
    module.def(
        "rms_norm",
        [](Address x, Address weight, std::int64_t rows, std::int64_t width, float eps, const std::string& dtype, Address out) {
            const Element type = element(dtype);
            py::gil_scoped_release release;
            rms_norm(pointer(x), pointer(weight), rows, width, eps, type, pointer(out));
        },
        py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("rows"), py::arg("width"), py::arg("eps"), py::arg("dtype"),
        py::arg("out"), "Addresses of contiguous x [rows, width], weight [width] and out. See rsvlm_infer.ops.rms_norm.");
}

}  // namespace rsvlm::python
