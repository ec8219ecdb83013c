// The description of one layer of a call for the CUDA kernels, and the functions of one cell and
// storage type.
#pragma once

#include <cstddef>

#include "backend.h"
#include "library.h"
#include "problem.h"
#include "rows.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fastrnn::persistent {
struct Plan;
struct Sizes;
}  // namespace fastrnn::persistent

namespace fastrnn::cuda {

struct Layer {
  CellOptions maths;
  Rows rows;
  const std::int64_t* batch_sizes = nullptr;  // on the host; only for packed data
  Index directions = 1, I = 0, H = 0, P = 0, O = 0;

  Sequence input;                          // [.., I], storage
  State h0, c0;                            // [D, B, O], [D, B, H], storage
  const Parameters* parameters = nullptr;  // [D]
  Sequence output;                         // [.., D·O], storage, contiguous
  Sequence cell;                           // [.., D·H], compute type; absent: not saved
  void* h_n = nullptr;                     // [D, B, O], storage
  void* c_n = nullptr;                     // [D, B, H], storage
  void* saved = nullptr;                   // [D, pairs, planes·Hp], compute type; null: not kept
  Index saved_group = 0;                   // elements between directions of `saved`
  bool consume_saved = false;              // the gradients of the gates take its place

  Sequence d_output;                   // storage; absent for a layer below the last
  Sequence d_hidden;                   // storage; absent: zeros
  Sequence d_cell;                     // compute type; absent: zeros
  State d_h_n, d_c_n;                  // storage
  void* d_above = nullptr;             // [pairs, D·O], compute type: from the layer above
  void* d_below = nullptr;             // [pairs, I], compute type: to the layer below
  void* d_input = nullptr;             // [pairs, I], storage: for the first layer, not d_below
  void* d_h0 = nullptr;                // [D, B, O], storage
  void* d_c0 = nullptr;                // [D, B, H], storage
  Parameters* d_parameters = nullptr;  // [D]

  void* scratch = nullptr;
  const persistent::Plan* plan = nullptr;  // the persistent kernel of the pass; null: step by step
  Tools tools;
};

// The functions of one cell and storage type.
struct LayerFunctions {
  std::size_t (*forward_scratch)(const Layer&);
  std::size_t (*backward_scratch)(const Layer&);
  void (*forward)(const Layer&);
  void (*backward)(const Layer&);
  // The sizes by which a persistent kernel is chosen for a pass: null, or why the layer has none.
  const char* (*persistent_sizes)(const Layer&, Pass, persistent::Sizes*);
};

// By the cell's index in AllCells; one table for each storage type, each in its translation unit.
const LayerFunctions& functions_f32(int cell);
const LayerFunctions& functions_f64(int cell);
const LayerFunctions& functions_bf16(int cell);
const LayerFunctions& functions_f16(int cell);

// Allocates pieces from one block of memory, none for zero elements; if the block is null, it only
// counts bytes. Under AddressSanitizer, where kernels run on the CPU, the gaps between pieces are
// poisoned.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(Index count) {
    const std::size_t size = static_cast<std::size_t>(count) * sizeof(T);
    if (size == 0) return nullptr;
    char* piece = base_ ? base_ + used_ : nullptr;
    std::size_t whole = (size + kAlignment - 1) / kAlignment * kAlignment;
#if defined(__SANITIZE_ADDRESS__)
    whole += kAlignment;
    if (piece) ASAN_UNPOISON_MEMORY_REGION(piece, size);
    if (piece) ASAN_POISON_MEMORY_REGION(piece + size, whole - size);
#endif
    used_ += whole;
    return reinterpret_cast<T*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  static constexpr std::size_t kAlignment = 256;
  char* base_;
  std::size_t used_ = 0;
};

}  // namespace fastrnn::cuda
