#include "memory.h"

#include <utility>

namespace fastrnn::bind {

namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void* new_aligned(std::size_t bytes) {
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) throw OutOfMemory(bytes);
  return data;
}

void free_aligned(void* data) { ::operator delete(data, kAlignment); }

Memory::Memory(std::size_t bytes) : data_(new_aligned(bytes)), bytes_(bytes) {}

void Memory::Free::operator()(void* data) const { free_aligned(data); }

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
