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

// What stays the same from token to token, so that a call carries three numbers: it costs 0.3 microseconds instead of 1.2, and
// decoding makes hundreds per token.
class WeightMatmul {
  public:
    WeightMatmul(const std::string& kind, std::int64_t rows, std::int64_t columns, bool wide_scales, Address layout)
        : shape_(shape_of(kind, rows, columns, wide_scales)), layout_(pointer(layout)) {}

    template <Element Type>
    void run(Address x, std::int64_t tokens, Address out) const {
        py::gil_scoped_release release;
        weight_matmul(shape_, layout_, pointer(x), tokens, Type, pointer(out));
    }

  private:
    WeightShape shape_;
    const void* layout_;
};

}  // namespace

void register_weight_matmul(py::module_& module) {
    module.def("weight_layout_bytes", &layout_bytes, py::kw_only(), py::arg("kind"), py::arg("rows"), py::arg("columns"),
               py::arg("wide_scales"), "Bytes of the layout that weight_matmul reads.");
    module.def("lay_out_weight", &lay_out, py::kw_only(), py::arg("kind"), py::arg("rows"), py::arg("columns"),
               py::arg("wide_scales"), py::arg("codes"), py::arg("scales"), py::arg("layout"),
               "Addresses of a PackedWeight's codes and scales (0 for bf16) and of the layout to write.");
    const char* call = "Addresses of contiguous x [tokens, columns] and out [tokens, rows]. See rsvlm_infer.ops.weight_matmul.";
    py::class_<WeightMatmul>(module, "WeightMatmul",
                             "The product with one weight, whose layout at this address must outlive it.")
        .def(py::init<const std::string&, std::int64_t, std::int64_t, bool, Address>(), py::kw_only(), py::arg("kind"),
             py::arg("rows"), py::arg("columns"), py::arg("wide_scales"), py::arg("layout"))
        .def("float32", &WeightMatmul::run<Element::kFloat32>, py::arg("x"), py::arg("tokens"), py::arg("out"), call)
        .def("bfloat16", &WeightMatmul::run<Element::kBfloat16>, py::arg("x"), py::arg("tokens"), py::arg("out"), call);
}

}  // namespace rsvlm::python
