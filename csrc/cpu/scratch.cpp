#include "rsvlm/scratch.h"

#include <memory>
#include <new>

namespace rsvlm {
namespace {

constexpr std::align_val_t kAlignment{64};  // a cache line, and the widest vector

struct Release {
    void operator()(void* block) const { ::operator delete(block, kAlignment); }
};

struct Block {
    std::unique_ptr<void, Release> memory;
    std::size_t bytes = 0;
};

}  // namespace

void* thread_scratch(std::size_t bytes, int slot) {
    thread_local Block blocks[2];
    Block& block = blocks[slot];
    if (block.bytes < bytes) {
        block.memory.reset();  // first, so that old and new are never held together
        block.bytes = 0;
        block.memory.reset(::operator new(bytes, kAlignment));
        block.bytes = bytes;
    }
    return block.memory.get();
}

}  // namespace rsvlm
