#include "memory.h"

#include <new>
#include <utility>

namespace fastrnn::bind {

Memory::Memory(std::size_t bytes)
    : data_(::operator new(bytes, std::align_val_t{64})), bytes_(bytes) {}

void Memory::Free::operator()(void* data) const { ::operator delete(data, std::align_val_t{64}); }

thread_local Memory Scratch::kept_;

Scratch::Scratch(std::size_t bytes) : memory_(std::exchange(kept_, Memory{})) {
  if (memory_.bytes() >= bytes) return;
  memory_ = Memory();  // given back before the larger piece is asked for
  memory_ = Memory(bytes);
}

Scratch::~Scratch() {
  if (memory_.bytes() <= kKept) kept_ = std::move(memory_);
}

}  // namespace fastrnn::bind
