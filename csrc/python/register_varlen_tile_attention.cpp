#include <pybind11/stl.h>

#include "bindings.h"
#include "pointers.h"
#include "rsvlm/varlen_tile_attention.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

void run(Address q, Address k, Address v, Address out, const Strides& q_strides, const Strides& k_strides,
         const Strides& v_strides, const std::vector<std::int64_t>& cu_seqlens, const std::vector<std::int64_t>& cu_seqlens_k,
         std::int64_t heads, std::int64_t head_dim, const std::string& dtype, float scale) {
    const TileAttention call{{pointer(q), q_strides[0], q_strides[1]},
                             {pointer(k), k_strides[0], k_strides[1]},
                             {pointer(v), v_strides[0], v_strides[1]},
                             pointer(out),
                             heads,
                             head_dim,
                             element(dtype),
                             scale};
    py::gil_scoped_release release;
    varlen_tile_attention(call, cu_seqlens, cu_seqlens_k);
}

}  // namespace

void register_varlen_tile_attention(py::module_& module) {
    module.def("varlen_tile_attention", &run, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("out"),
               py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("cu_seqlens"), py::arg("cu_seqlens_k"),
               py::arg("heads"), py::arg("head_dim"), py::arg("dtype"), py::arg("scale"),
               "Addresses of [S, H, D] arrays with contiguous D and their (row, head) strides in elements, of dtype float32 or "
               "bfloat16; out is contiguous. See rsvlm_infer.ops.varlen_tile_attention.");
}

}  // namespace rsvlm::python
