#include "bindings.h"
#include "pointers.h"
#include "rsvlm/weight_matmul.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

WeightShape shape_of(const std::string& kind, std::int64_t rows, std::int64_t columns, bool wide_scales) {
    if (kind == "bf16") {
        return {WeightKind::kBf16, rows, columns, false};
    }
    if (kind == "int8") {
        return {WeightKind::kInt8, rows, columns, wide_scales};
    }
    if (kind == "int4") {
        return {WeightKind::kInt4, rows, columns, wide_scales};
    }
    throw std::invalid_argument("kind must be 'bf16', 'int8' or 'int4', got '" + kind + "'; pack the weight with pack_weight");
}

std::int64_t layout_bytes(const std::string& kind, std::int64_t rows, std::int64_t columns, bool wide_scales) {
    return weight_layout_bytes(shape_of(kind, rows, columns, wide_scales));
}

void lay_out(const std::string& kind, std::int64_t rows, std::int64_t columns, bool wide_scales, Address codes, Address scales,
             Address layout) {
    const WeightShape shape = shape_of(kind, rows, columns, wide_scales);
    py::gil_scoped_release release;
    lay_out_weight(shape, pointer(codes), pointer(scales), pointer(layout));
}

void run(const std::string& kind, std::int64_t rows, std::int64_t columns, bool wide_scales, Address layout, Address x,
         std::int64_t tokens, const std::string& dtype, Address out) {
    const WeightShape shape = shape_of(kind, rows, columns, wide_scales);
    const Element type = element(dtype);
    py::gil_scoped_release release;
    weight_matmul(shape, pointer(layout), pointer(x), tokens, type, pointer(out));
}

}  // namespace

void register_weight_matmul(py::module_& module) {
    module.def("weight_layout_bytes", &layout_bytes, py::kw_only(), py::arg("kind"), py::arg("rows"), py::arg("columns"),
               py::arg("wide_scales"), "Bytes of the layout that weight_matmul reads.");
    module.def("lay_out_weight", &lay_out, py::kw_only(), py::arg("kind"), py::arg("rows"), py::arg("columns"),
               py::arg("wide_scales"), py::arg("codes"), py::arg("scales"), py::arg("layout"),
               "Addresses of a PackedWeight's codes and scales (0 for bf16) and of the layout to write.");
    module.def("weight_matmul", &run, py::kw_only(), py::arg("kind"), py::arg("rows"), py::arg("columns"),
               py::arg("wide_scales"), py::arg("layout"), py::arg("x"), py::arg("tokens"), py::arg("dtype"), py::arg("out"),
               "Addresses of a layout, of contiguous x [tokens, columns] and out [tokens, rows] of dtype float32 or bfloat16. "
               "See rsvlm_infer.ops.weight_matmul.");
}

}  // namespace rsvlm::python
