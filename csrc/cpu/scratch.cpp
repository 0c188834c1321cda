#include "rsvlm/scratch.h"

namespace rsvlm {
namespace {

constexpr std::align_val_t kAlignment{64};  // a cache line, and the widest vector

}  // namespace

void Buffer::Release::operator()(void* block) const { ::operator delete(block, kAlignment); }

void Buffer::grow(std::size_t bytes) {
    if (bytes_ < bytes) {
        memory_.reset();  // first, so that old and new are never held together
        bytes_ = 0;
        memory_.reset(::operator new(bytes, kAlignment));
        bytes_ = bytes;
    }
}

void* thread_scratch(std::size_t bytes, int slot) {
    thread_local Buffer buffers[2];
    return buffers[slot].hold<char>(static_cast<std::int64_t>(bytes));
}

}  // namespace rsvlm
