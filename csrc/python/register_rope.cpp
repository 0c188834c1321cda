#include "bindings.h"
#include "pointers.h"
#include "rsvlm/rope.h"

namespace py = pybind11;

namespace rsvlm::python {

void register_rope(py::module_& module) {
    module.def(
        "rope",
        [](Address x, std::int64_t token_stride, Address cosines, Address sines, std::int64_t tokens, std::int64_t heads,
           std::int64_t head_dim, const std::string& dtype, Address out) {
            const Element type = element(dtype);
            py::gil_scoped_release release;
            rope(pointer(x), token_stride, static_cast<const float*>(pointer(cosines)),
                 static_cast<const float*>(pointer(sines)), tokens, heads, head_dim, type, pointer(out));
        },
        py::kw_only(), py::arg("x"), py::arg("token_stride"), py::arg("cosines"), py::arg("sines"), py::arg("tokens"),
        py::arg("heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("out"),
        "Addresses of x [tokens, heads, head_dim], float32 cosines and sines [tokens, head_dim / 2], and contiguous out. "
        "See rsvlm_infer.ops.rope.");
}

}  // namespace rsvlm::python
