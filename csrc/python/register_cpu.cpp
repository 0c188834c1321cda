#include "bindings.h"
#include "rsvlm/cpu.h"

namespace py = pybind11;

namespace rsvlm::python {

void register_cpu(py::module_& module) {
    module.def(
        "build_info",
        []() {
            py::dict info;
            info["isa"] = isa();
            info["openmp"] = has_openmp();
            info["num_threads"] = num_threads();
            return info;
        },
        "isa: str (avx512, avx2 or baseline), openmp: bool, num_threads: int that a parallel region would use now.");
}

}  // namespace rsvlm::python
