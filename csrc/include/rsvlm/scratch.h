// Memory that a thread keeps between calls, because a fresh block of some hundred kilobytes costs a page fault per 4 KiB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace rsvlm {

// At least `bytes` bytes on a 64-byte boundary, contents undefined. Each slot (0..1) of each thread owns one block, which grows
// and lives as long as the thread; the next call for the same slot invalidates the last one. Throws std::bad_alloc.
void* thread_scratch(std::size_t bytes, int slot = 0);

// Memory that an owner keeps between calls: on a 64-byte boundary, so that blocks of 32 floats share no cache line, and never
// cleared. Contents are undefined after hold().
class Buffer {
  public:
    // `count` values; invalidates what it gave before. Throws std::bad_alloc.
    template <class T>
    T* hold(std::int64_t count) {
        grow(static_cast<std::size_t>(count) * sizeof(T));
        return static_cast<T*>(memory_.get());
    }

  private:
    struct Release {
        void operator()(void* block) const;
    };
    void grow(std::size_t bytes);

    std::unique_ptr<void, Release> memory_;
    std::size_t bytes_ = 0;
};

}  // namespace rsvlm
