#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "rsvlm/pack_tiles.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

using Pairs = py::array_t<std::int64_t, py::array::c_style>;

Resample parse_resample(const std::string& name) {
    if (name == "bicubic") {
        return Resample::bicubic;
    }
    if (name == "bilinear") {
        return Resample::bilinear;
    }
    if (name == "lanczos") {
        return Resample::lanczos;
    }
    throw std::invalid_argument("resample must be bicubic, bilinear or lanczos, got " + name + "; choose one of them");
}

void check_pairs(const char* name, const Pairs& pairs, std::size_t count) {
    if (pairs.ndim() != 2 || pairs.shape(0) != static_cast<py::ssize_t>(count) || pairs.shape(1) != 2) {
        throw std::invalid_argument(std::string(name) + " must be int64 [" + std::to_string(count) +
                                    ", 2]; pass one pair per image");
    }
}

ImageView view_of(const py::array& image, std::size_t index) {
    const bool fits = py::isinstance<py::array_t<std::uint8_t>>(image) && image.ndim() == 3 && image.shape(2) == 3 &&
                      image.strides(2) == 1 && image.strides(1) == 3;
    if (!fits) {
        throw std::invalid_argument("images[" + std::to_string(index) +
                                    "] must be uint8 [h, w, 3] with contiguous pixels; pass numpy.ascontiguousarray of it");
    }
    return {static_cast<const std::uint8_t*>(image.data()), image.shape(0), image.shape(1), image.strides(0)};
}

py::array_t<float> run(const std::vector<py::array>& images, const Pairs& canvases, const Pairs& crops, const Pairs& grids,
                       const std::vector<bool>& vertical_first, std::int64_t patch, const std::array<float, 3>& mean,
                       const std::array<float, 3>& std, const std::string& resample, const std::array<std::uint8_t, 3>& fill) {
    check_pairs("canvases", canvases, images.size());
    check_pairs("crops", crops, images.size());
    check_pairs("grids", grids, images.size());
    if (vertical_first.size() != images.size()) {
        throw std::invalid_argument("vertical_first must hold one flag per image; pass " + std::to_string(images.size()));
    }
    std::vector<Tile> tiles;
    for (std::size_t t = 0; t < images.size(); ++t) {
        const auto row = static_cast<py::ssize_t>(t);
        tiles.push_back({view_of(images[t], t), canvases.at(row, 0), canvases.at(row, 1), crops.at(row, 0), crops.at(row, 1),
                         grids.at(row, 0), grids.at(row, 1), vertical_first[t]});
    }
    const PackOptions options{patch, mean, std, parse_resample(resample), fill};
    py::array_t<float> patches({count_patches(tiles, options), 3 * patch * patch});
    float* patches_ptr = patches.mutable_data();
    {
        py::gil_scoped_release release;
        pack_tiles(tiles, options, patches_ptr);
    }
    return patches;
}

}  // namespace

void register_pack_tiles(py::module_& module) {
    module.def("pack_tiles", &run, py::kw_only(), py::arg("images"), py::arg("canvases").noconvert(),
               py::arg("crops").noconvert(), py::arg("grids").noconvert(), py::arg("vertical_first"), py::arg("patch"),
               py::arg("mean"), py::arg("std"), py::arg("resample"), py::arg("fill"),
               "T images uint8 [h, w, 3], int64 [T, 2] three times, T flags -> float32 [S, 3 * patch * patch]; "
               "see rsvlm_infer.ops.pack_tiles.");
}

}  // namespace rsvlm::python
