#include <pybind11/stl.h>

#include "bindings.h"
#include "pointers.h"
#include "rsvlm/decode_attention.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

using BatchStrides = std::array<std::int64_t, 3>;

BatchRows rows(Address address, const BatchStrides& strides) { return {pointer(address), strides[0], strides[1], strides[2]}; }

void run(Address q, Address k, Address v, Address positions, Address mask, Address out, const BatchStrides& q_strides,
         const BatchStrides& k_strides, const BatchStrides& v_strides, std::int64_t batch, std::int64_t tokens,
         std::int64_t heads, std::int64_t kv_heads, std::int64_t capacity, std::int64_t head_dim, const std::string& dtype) {
    const DecodeAttention call{rows(q, q_strides),
                               rows(k, k_strides),
                               rows(v, v_strides),
                               static_cast<const std::int64_t*>(pointer(positions)),
                               static_cast<const bool*>(pointer(mask)),
                               pointer(out),
                               batch,
                               tokens,
                               heads,
                               kv_heads,
                               capacity,
                               head_dim,
                               element(dtype)};
    py::gil_scoped_release release;
    decode_attention(call);
}

}  // namespace

void register_decode_attention(py::module_& module) {
    module.def(
        "decode_attention", &run, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("positions"),
        py::arg("mask"), py::arg("out"), py::arg("q_strides"), py::arg("k_strides"), py::arg("v_strides"), py::arg("batch"),
        py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"), py::arg("capacity"), py::arg("head_dim"), py::arg("dtype"),
        "Addresses of arrays with contiguous head_dim and their (batch, row, head) strides in elements; positions int64 and "
        "mask bool (0 = causal) contiguous. See rsvlm_infer.ops.decode_attention.");
}

}  // namespace rsvlm::python
