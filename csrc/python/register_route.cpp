#include <pybind11/stl.h>

#include "bindings.h"
#include "pointers.h"
#include "rsvlm/route.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

void run(Address logits, std::int64_t tokens, std::int64_t experts, const std::vector<std::int64_t>& level_offsets,
         std::int64_t k, Address expert_offsets, Address permutation, Address weights) {
    const RouteOutputs outputs{static_cast<std::int32_t*>(pointer(expert_offsets)),
                               static_cast<std::int32_t*>(pointer(permutation)), static_cast<float*>(pointer(weights))};
    py::gil_scoped_release release;
    route(static_cast<const float*>(pointer(logits)), tokens, experts, level_offsets, k, outputs);
}

}  // namespace

void register_route(py::module_& module) {
    module.def("route", &run, py::kw_only(), py::arg("logits"), py::arg("tokens"), py::arg("experts"), py::arg("level_offsets"),
               py::arg("k"), py::arg("expert_offsets"), py::arg("permutation"), py::arg("weights"),
               "Addresses of contiguous float32 [N, E] in; int32 [E + 1], int32 [N * k], float32 [N, k] out. "
               "See rsvlm_infer.ops.route.");
}

}  // namespace rsvlm::python
