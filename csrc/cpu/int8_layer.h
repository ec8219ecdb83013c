// One layer of an int8 step as the kernels of an instruction set see it, and the table of those
// kernels. int8.h says what they compute.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "threads.h"

namespace fastrnn {

struct Int8Layer {
  CellOptions maths;
  std::int64_t B = 0, I = 0, H = 0, P = 0, O = 0;
  const Parameters* parameters = nullptr;  // read by pack alone
  void* packed = nullptr;

  Sequence input;            // [1, B, I]
  const float* h = nullptr;  // [B, O], the states before the step, contiguous as all that follow
  const float* c = nullptr;  // [B, H]; null for cells of one state
  float* h_n = nullptr;      // [B, O], after it
  float* c_n = nullptr;      // [B, H]
  float* output = nullptr;   // [B, O]: a copy of h_n; null: not wanted

  int threads = 1;          // the most that the scratch is laid out for
  Barrier* team = nullptr;  // of the threads that work on the layer
  Barrier::Wait wait = Barrier::Wait::step;
  void* scratch = nullptr;
};

// The kernels of one cell on one instruction set.
struct Int8Kernels {
  int lanes;            // products' sums in a vector
  int depth;            // products that a lane adds at once
  int rows_per_block;   // rows that one micro-kernel works on
  int units_per_block;  // hidden units of one block of packed weights
  std::size_t (*packed_size)(const Int8Layer&);
  std::size_t (*scratch)(const Int8Layer&);
  void (*pack)(const Int8Layer&, int thread, int threads);
  void (*step)(const Int8Layer&, int thread, int threads);  // no barrier at its end
};

// What the backend's functions are where Problem::int8 is true (int8.cpp).
std::size_t int8_workspace_size(const Problem&);
std::size_t int8_packed_size(const Problem&);
void int8_pack(const Problem&, void* to);
void int8_forward(const Problem&);

}  // namespace fastrnn
