// One register function per file; each only translates between numpy and the core.
#pragma once

#include <pybind11/pybind11.h>

namespace rsvlm::python {

void register_cpu(pybind11::module_& module);
void register_complexity_map(pybind11::module_& module);
void register_cell_means(pybind11::module_& module);
void register_pack_tiles(pybind11::module_& module);
void register_varlen_tile_attention(pybind11::module_& module);
void register_grouped_experts(pybind11::module_& module);
void register_weight_matmul(pybind11::module_& module);
void register_cue_search(pybind11::module_& module);
void register_rms_norm(pybind11::module_& module);
void register_rope(pybind11::module_& module);
void register_decode_attention(pybind11::module_& module);
void register_route(pybind11::module_& module);
void register_model(pybind11::module_& module);

}  // namespace rsvlm::python
