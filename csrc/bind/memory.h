// 64-byte aligned host memory.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <string>

namespace fastrnn::bind {

// MemoryError in Python, with the number of bytes.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::size_t bytes)
      : message_("out of memory: " + std::to_string(bytes) + " bytes cannot be allocated") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

// 64-byte aligned, freed by free_aligned(). Throws OutOfMemory.
void* new_aligned(std::size_t bytes);
void free_aligned(void* data);

// Asks for large pages (2 MiB) where the memory holds some, before it is first written. A step that
// reads megabytes of packed weights spends a tenth of its time on misses of the TLB with pages of
// 4 KiB, and a training call up to a quarter on the first write to each page of what it keeps. A
// refusal is harmless.
void ask_for_large_pages(void* data, std::size_t bytes);

class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes);
  std::size_t bytes() const { return bytes_; }
  void* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* data) const;
  };
  std::unique_ptr<void, Free> data_;
  std::size_t bytes_ = 0;
};

// Memory for one call. A thread keeps its last one for its next call, up to kKept bytes: fresh
// pages cost more than the work of a small call.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes);
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();
  void* data() const { return memory_.data(); }

 private:
  static constexpr std::size_t kKept = std::size_t{64} << 20;

  static thread_local Memory kept_;
  Memory memory_;
};

}  // namespace fastrnn::bind
