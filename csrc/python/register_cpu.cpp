#include "bindings.h"
#include "pointers.h"
#include "rsvlm/cpu.h"

namespace py = pybind11;

namespace rsvlm::python {

void register_cpu(py::module_& module) {
    module.def(
        "build_info",
        []() {
            py::dict info;
            info["isa"] = isa();
            info["kernel_isa"] = isa_name(kernel_isa());
            info["openmp"] = has_openmp();
            info["num_threads"] = num_threads();
            return info;
        },
        "isa: str (avx512, avx2 or baseline) of compiler-vectorised loops, kernel_isa: str of hand-written kernels (portable, "
        "avx2, avx512 or avx512_bf16), openmp: bool, num_threads: int that a parallel region would use now.");
    module.def(
        "limit_isa", &limit_isa, py::kw_only(), py::arg("isa"),
        "Holds hand-written kernels to 'portable', 'avx2', 'avx512' or 'avx512_bf16'; 'auto' takes the best. For tests.");
    module.def(
        "ask_for_huge_pages",
        [](Address address, std::size_t length_bytes) { ask_for_huge_pages(pointer(address), length_bytes); }, py::kw_only(),
        py::arg("address"), py::arg("length_bytes"), "Huge pages for memory that was not written yet, if there are any.");
}

}  // namespace rsvlm::python
