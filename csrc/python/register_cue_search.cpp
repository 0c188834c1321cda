#include <pybind11/numpy.h>

#include <stdexcept>

#include "bindings.h"
#include "rsvlm/cue_search.h"

namespace py = pybind11;

namespace rsvlm::python {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Halves = py::array_t<std::uint16_t, py::array::c_style>;

py::tuple run(const Floats& visual, const py::object& query, const Halves& entries, std::int64_t k, double beta) {
    if (visual.ndim() != 2 || entries.ndim() != 2 || visual.shape(0) < 1 || visual.shape(1) != entries.shape(1) || k < 1) {
        throw std::invalid_argument("visual must be [V >= 1, De], entries [M, De] and k at least 1; check their shapes");
    }
    Floats asked;
    if (!query.is_none()) {
        asked = Floats::ensure(query);
        if (!asked || asked.size() != entries.shape(1)) {
            throw std::invalid_argument("query must be float32 [De]; embed it with the same checkpoint");
        }
    }
    const CueSearch call{visual.data(),
                         query.is_none() ? nullptr : asked.data(),
                         entries.data(),
                         visual.shape(0),
                         entries.shape(1),
                         entries.shape(0),
                         k,
                         beta};
    std::vector<Cue> found;
    {
        py::gil_scoped_release release;
        found = cue_search(call);
    }
    py::array_t<float> scores(static_cast<py::ssize_t>(found.size()));
    py::array_t<std::int64_t> rows(static_cast<py::ssize_t>(found.size()));
    for (std::size_t i = 0; i < found.size(); ++i) {
        scores.mutable_data()[i] = found[i].score;
        rows.mutable_data()[i] = found[i].row;
    }
    return py::make_tuple(scores, rows);
}

}  // namespace

void register_cue_search(py::module_& module) {
    module.def("cue_search", &run, py::kw_only(), py::arg("visual").noconvert(), py::arg("query").none(true),
               py::arg("entries").noconvert(), py::arg("k"), py::arg("beta"),
               "float32 [V, De], float32 [De] or None, float16 bits as uint16 [M, De] -> float32 scores and int64 rows; "
               "see rsvlm_infer.ops.cue_search.");
}

}  // namespace rsvlm::python
