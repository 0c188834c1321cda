// Memory that a thread keeps between calls, because a fresh block of some hundred kilobytes costs a page fault per 4 KiB.
#pragma once

#include <cstddef>

namespace rsvlm {

// At least `bytes` bytes on a 64-byte boundary, contents undefined. Each slot (0..1) of each thread owns one block, which grows
// and lives as long as the thread; the next call for the same slot invalidates the last one. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes, int slot = 0);

}  // namespace rsvlm
