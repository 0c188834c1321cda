#include "rsvlm/parallel.h"

#include <exception>

#include "rsvlm/cpu.h"
#include "rsvlm/scratch.h"

namespace rsvlm {
namespace {

float* scratch_of(std::size_t floats) {
    return floats == 0 ? nullptr : static_cast<float*>(thread_scratch(floats * sizeof(float)));
}

}  // namespace

int threads_for(double work, double least) { return work > least ? num_threads() : 1; }

void run_parts(std::int64_t count, int threads, std::size_t scratch_floats, PartFunction function, const void* body) {
    if (threads <= 1 || count <= 1) {  // a region of one thread would cost a quarter of a microsecond
        float* scratch = scratch_of(scratch_floats);
        for (std::int64_t part = 0; part < count; ++part) {
            function(body, part, scratch);
        }
        return;
    }
#ifdef _OPENMP
    std::exception_ptr failure;  // an exception must not leave a parallel region
#pragma omp parallel num_threads(threads)
    {
        bool ready = true;
        float* scratch = nullptr;
        const auto guarded = [&](const auto& step) {
            try {
                step();
            } catch (...) {
                ready = false;
#pragma omp critical
                failure = std::current_exception();
            }
        };
        guarded([&] { scratch = scratch_of(scratch_floats); });
#pragma omp for schedule(dynamic, 1)
        for (std::int64_t part = 0; part < count; ++part) {
            if (ready) {
                guarded([&] { function(body, part, scratch); });
            }
        }
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
#endif
}

}  // namespace rsvlm
