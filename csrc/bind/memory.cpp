#include "memory.h"

#include <cstdint>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn::bind {

namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

void ask_for_large_pages(void* data, std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (at + kPage - 1) / kPage * kPage, end = (at + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

void* new_aligned(std::size_t bytes) {
  void* data = ::operator new(bytes, kAlignment, std::nothrow);
  if (data == nullptr) throw OutOfMemory(bytes);
  return data;
}

void free_aligned(void* data) { ::operator delete(data, kAlignment); }

Memory::Memory(std::size_t bytes) : data_(new_aligned(bytes)), bytes_(bytes) {
  ask_for_large_pages(data_.get(), bytes);
}

void Memory::Free::operator()(void* data) const { free_aligned(data); }

thread_local Memory Scratch::kept_;

Scratch::Scratch(std::size_t bytes) : memory_(std::exchange(kept_, Memory{})) {
  if (memory_.bytes() >= bytes) return;
  memory_ = Memory();  // freed before the larger one is allocated
  memory_ = Memory(bytes);
}

Scratch::~Scratch() {
  if (memory_.bytes() <= kKept) kept_ = std::move(memory_);
}

}  // namespace fastrnn::bind
