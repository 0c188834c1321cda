#include "bindings.h"
#include "pointers.h"
#include "rsvlm/grouped_experts.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

void run(Address x, Address expert_offsets, Address permutation, Address weights, Address w_gate, Address w_up, Address w_down,
         Address b_up, Address b_down, Address out, std::int64_t tokens, std::int64_t width, std::int64_t hidden,
         std::int64_t experts, std::int64_t k, const std::string& dtype) {
    const GroupedExperts call{pointer(x),
                              static_cast<const std::int32_t*>(pointer(expert_offsets)),
                              static_cast<const std::int32_t*>(pointer(permutation)),
                              static_cast<const float*>(pointer(weights)),
                              pointer(w_gate),
                              pointer(w_up),
                              pointer(w_down),
                              pointer(b_up),
                              pointer(b_down),
                              pointer(out),
                              tokens,
                              width,
                              hidden,
                              experts,
                              k,
                              element(dtype)};
    py::gil_scoped_release release;
    grouped_experts(call);
}

}  // namespace

void register_grouped_experts(py::module_& module) {
    module.def("grouped_experts", &run, py::kw_only(), py::arg("x"), py::arg("expert_offsets"), py::arg("permutation"),
               py::arg("weights"), py::arg("w_gate"), py::arg("w_up"), py::arg("w_down"), py::arg("b_up"), py::arg("b_down"),
               py::arg("out"), py::arg("tokens"), py::arg("width"), py::arg("hidden"), py::arg("experts"), py::arg("k"),
               py::arg("dtype"),
               "Addresses of contiguous arrays of dtype float32 or bfloat16 (offsets and permutation int32, weights float32), "
               "0 for what is absent. See rsvlm_infer.ops.grouped_experts.");
}

}  // namespace rsvlm::python
