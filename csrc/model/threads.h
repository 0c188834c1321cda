// How the model's loops are dealt out to threads. Knows no op.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>

#include "rsvlm/cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rsvlm {

// body(part, thread) for parts 0..count, taken one by one by at most `threads` threads, so that a busy core holds nobody up.
// What a part throws is thrown here, when all threads are back.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
    threads = static_cast<int>(std::clamp<std::int64_t>(count, 1, threads));
    if (threads == 1) {
        for (std::int64_t part = 0; part < count; ++part) {
            body(part, 0);
        }
        return;
    }
#ifdef _OPENMP
    std::exception_ptr failure;  // an exception must not leave a region
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (std::int64_t part = 0; part < count; ++part) {
        try {
            body(part, omp_get_thread_num());
        } catch (...) {
#pragma omp critical
            failure = std::current_exception();
        }
    }
    if (failure) {
        std::rethrow_exception(failure);
    }
#endif
}

// body(thread, threads) once on every thread, which may meet at barrier(). There may come fewer threads than asked for, and the
// body must not throw: the others would wait for ever.
template <class Body>
void parallel_region(int threads, const Body& body) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    body(0, 1);
}

// All threads of the region come here before one leaves.
inline void barrier(int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp barrier
    }
#endif
    (void)threads;
}

// The share of thread `thread` of `count` things: begin and end.
struct Share {
    std::int64_t first, stop;
};
inline Share share_of(std::int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

}  // namespace rsvlm
