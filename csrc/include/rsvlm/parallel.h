// How a kernel's parts are dealt out to threads. Knows no op.
#pragma once

#include <cstddef>
#include <cstdint>

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

}  // namespace rsvlm
