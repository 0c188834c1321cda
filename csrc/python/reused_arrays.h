// Large arrays for Python whose memory serves again once they are dropped: fresh pages are cleared by the system, which costs a
// batch of 32 tiles a twentieth of its time.
#pragma once

#include <pybind11/numpy.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "rsvlm/cpu.h"

namespace rsvlm::python {

class ReusedArrays {
  public:
    // Contents undefined. Small arrays are numpy's own.
    static pybind11::array_t<float> make(const std::vector<pybind11::ssize_t>& shape) {
        std::size_t bytes = sizeof(float);
        for (const pybind11::ssize_t side : shape) {
            bytes *= static_cast<std::size_t>(side);
        }
        if (bytes < kLeastBytes) {
            return pybind11::array_t<float>(shape);
        }
        Block* block = held().take(bytes);
        const pybind11::capsule owner(block, [](void* dropped) { held().give(static_cast<Block*>(dropped)); });
        return pybind11::array_t<float>(shape, static_cast<float*>(block->memory.get()), owner);
    }

  private:
    static constexpr std::size_t kLeastBytes = 4 << 20;  // from here on malloc gives memory back to the system
    static constexpr std::size_t kMostHeld = 64 << 20;   // what 32 tiles of ViT-S need
    static constexpr std::align_val_t kAlignment{2 << 20};

    struct Release {
        void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
    };
    struct Block {
        std::unique_ptr<void, Release> memory;
        std::size_t bytes;
    };

    // Never destroyed: arrays may outlive everything else.
    static ReusedArrays& held() {
        static auto* const arrays = new ReusedArrays;
        return *arrays;
    }

    // The smallest held block that fits without wasting a quarter, or a new one.
    Block* take(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(busy_);
        std::size_t best = blocks_.size();
        for (std::size_t i = 0; i < blocks_.size(); ++i) {
            const std::size_t size = blocks_[i]->bytes;
            if (size >= bytes && size - bytes <= bytes / 4 && (best == blocks_.size() || size < blocks_[best]->bytes)) {
                best = i;
            }
        }
        if (best < blocks_.size()) {
            Block* block = blocks_[best].release();
            blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(best));
            held_bytes_ -= block->bytes;
            return block;
        }
        auto block = std::make_unique<Block>();
        block->memory.reset(::operator new(bytes, kAlignment));
        block->bytes = bytes;
        ask_for_huge_pages(block->memory.get(), bytes);
        return block.release();
    }

    // The oldest ones go when it is too much.
    void give(Block* block) {
        const std::lock_guard<std::mutex> lock(busy_);
        blocks_.emplace_back(block);
        held_bytes_ += block->bytes;
        while (held_bytes_ > kMostHeld) {
            held_bytes_ -= blocks_.front()->bytes;
            blocks_.erase(blocks_.begin());
        }
    }

    std::mutex busy_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::size_t held_bytes_ = 0;
};

}  // namespace rsvlm::python
