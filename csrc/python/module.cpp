#include "bindings.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Native twins of rsvlm_infer.ops. Every function takes keyword arguments only and releases the GIL.";
    rsvlm::python::register_cpu(module);
    rsvlm::python::register_complexity_map(module);
    rsvlm::python::register_cell_means(module);
    rsvlm::python::register_pack_tiles(module);
    rsvlm::python::register_varlen_tile_attention(module);
    rsvlm::python::register_grouped_experts(module);
    rsvlm::python::register_weight_matmul(module);
    rsvlm::python::register_cue_search(module);
    rsvlm::python::register_rms_norm(module);
    rsvlm::python::register_rope(module);
    rsvlm::python::register_decode_attention(module);
    rsvlm::python::register_route(module);
    rsvlm::python::register_model(module);
}
