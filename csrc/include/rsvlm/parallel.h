// How parts of a call are dealt out to threads, and how threads meet inside of one. Knows no op.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rsvlm {

// Threads for a call of `work` multiplications or bytes: one below `least`, where waking the others costs more than it saves.
// A million multiplications are some 10 microseconds.
int threads_for(double work, double least = 1 << 20);

// One part of a call: which one, and the thread's scratch.
using PartFunction = void (*)(const void* body, std::int64_t part, float* scratch);
void run_parts(std::int64_t count, int threads, std::size_t scratch_floats, PartFunction function, const void* body);

// body(part, scratch) for every part in 0..count, on at most `threads` threads that take them in order, one by one. `scratch`
// holds `scratch_floats` floats on a 64-byte boundary, null for 0, and is the thread's own: thread_scratch's slot 0. What a
// part throws, and a lack of memory, is thrown here once all threads are back; parts may then be missing.
template <class Body>
void for_each_part(std::int64_t count, int threads, std::size_t scratch_floats, const Body& body) {
    run_parts(
        count, threads, scratch_floats,
        [](const void* self, std::int64_t part, float* scratch) { (*static_cast<const Body*>(self))(part, scratch); }, &body);
}

// Of the calling thread among those of the innermost region, 0 outside of one.
inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
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
