#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "rsvlm/cell_means.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

using Mask = py::array_t<bool, py::array::c_style>;

Pixel pixel_of(const py::array& values) {
    static const std::map<std::string, Pixel> pixels{
        {"uint8", Pixel::kUint8},     {"int8", Pixel::kInt8},       {"uint16", Pixel::kUint16}, {"int16", Pixel::kInt16},
        {"uint32", Pixel::kUint32},   {"int32", Pixel::kInt32},     {"uint64", Pixel::kUint64}, {"int64", Pixel::kInt64},
        {"float32", Pixel::kFloat32}, {"float64", Pixel::kFloat64},
    };
    const auto name = py::str(values.dtype().attr("name")).cast<std::string>();
    const auto found = pixels.find(name);
    if (found == pixels.end()) {
        throw std::invalid_argument("values must be real numbers of a raster, got " + name + "; convert them");
    }
    return found->second;
}

void demand(bool holds, const char* message) {
    if (!holds) {
        throw std::invalid_argument(message);
    }
}

// Whether cells [C, h', w'] can be written with strides in elements.
bool can_hold(const py::array& out, std::int64_t bands, std::int64_t height, std::int64_t width) {
    return out.ndim() == 3 && out.shape(0) == bands && out.shape(1) == height && out.shape(2) == width &&
           out.strides(2) == out.itemsize() && out.strides(0) % out.itemsize() == 0 && out.strides(1) % out.itemsize() == 0;
}

void run(const py::array& values, std::int64_t factor, const std::optional<Mask>& valid, const std::optional<py::array>& nodata,
         py::array& means, py::array_t<bool>& found) {
    demand(values.ndim() == 3 && (values.flags() & py::array::c_style) != 0,
           "values must be C-contiguous [C, h, w]; copy them");
    demand(factor >= 1, "factor must be at least 1; round it to a power of two");
    const std::int64_t bands = values.shape(0), height = values.shape(1), width = values.shape(2);
    const std::int64_t cell_rows = (height + factor - 1) / factor, cell_cols = (width + factor - 1) / factor;
    demand(means.dtype().equal(values.dtype()) && can_hold(means, bands, cell_rows, cell_cols) &&
               can_hold(found, bands, cell_rows, cell_cols),
           "means and found must be [C, ceil(h / factor), ceil(w / factor)] of values' dtype and bool with contiguous rows");
    demand(!valid || (valid->ndim() == 3 && (valid->shape(0) == bands || valid->shape(0) == 1) && valid->shape(1) == height &&
                      valid->shape(2) == width),
           "valid must be [C or 1, h, w]; pass one flag per pixel");
    demand(!nodata || (nodata->ndim() == 1 && nodata->shape(0) == bands && nodata->dtype().equal(values.dtype()) &&
                       (nodata->flags() & py::array::c_style) != 0),
           "nodata must be one value of values' dtype per band");
    const CellMeans call{pixel_of(values),
                         values.data(),
                         valid ? reinterpret_cast<const std::uint8_t*>(valid->data()) : nullptr,
                         valid ? valid->shape(0) : 0,
                         nodata ? nodata->data() : nullptr,
                         bands,
                         height,
                         width,
                         factor,
                         means.mutable_data(),
                         means.strides(0) / means.itemsize(),
                         means.strides(1) / means.itemsize(),
                         reinterpret_cast<std::uint8_t*>(found.mutable_data()),
                         found.strides(0),
                         found.strides(1)};
    py::gil_scoped_release release;
    cell_means(call);
}

}  // namespace

void register_cell_means(py::module_& module) {
    module.def("cell_means", &run, py::kw_only(), py::arg("values").noconvert(), py::arg("factor"),
               py::arg("valid").noconvert().none(true), py::arg("nodata").noconvert().none(true), py::arg("means").noconvert(),
               py::arg("found").noconvert(),
               "[C, h, w] -> means and found [C, h', w'], which are written; see rsvlm_infer.ops.cell_means.");
}

}  // namespace rsvlm::python
