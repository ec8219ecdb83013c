#include "memory.h"

#include <cstdint>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastrnn::bind {

void prefer_large_pages(void* data, std::size_t bytes) {
#if defined(__linux__)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  const auto begin = (reinterpret_cast<std::uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

Memory::Memory(std::size_t bytes)
    : data_(::operator new(bytes, std::align_val_t{64})), bytes_(bytes) {
  prefer_large_pages(data(), bytes);
}

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
