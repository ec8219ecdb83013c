// One layer of a call as the kernels of an instruction set see it, and the table of those kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../problem.h"
#include "../steps.h"
#include "threads.h"

namespace fastrnn {

// How a team of threads divides a layer. Directions never wait for each other, nor do rows; hidden
// units are split only where there are too few rows, since that takes a barrier at each step.
struct Plan {
  int threads = 1;
  int direction_threads = 1;  // 1 or 2
  int row_threads = 1;
  int column_threads = 1;
};

struct Layer {
  CellOptions maths;
  const Steps* steps = nullptr;
  std::int64_t directions = 1, I = 0, H = 0, P = 0, O = 0;
  bool reverse = false;         // of one direction alone: it runs backwards in time
  Plan plan, single;            // with all threads, and with one
  Barrier* barriers = nullptr;  // [1 + threads]: of all threads, then one for each team

  Sequence input;                          // [.., I], storage
  State h0, c0;                            // [D, B, O], [D, B, H], storage
  State reset_h, reset_c;                  // [D, O], [D, H], storage
  bool wide_c0 = false;                    // c0 is of compute type
  const Parameters* parameters = nullptr;  // [D]
  Sequence output;                         // [.., D·O], storage
  Sequence copy;                           // forward: a copy of output; absent: not wanted
  Sequence cell;                           // [.., D·H], compute type; absent: not kept
  void* h_n = nullptr;                     // [D, B, O], storage
  void* c_n = nullptr;                     // [D, B, H], storage
  void* saved = nullptr;                   // [D, pairs, planes·Hp], compute type; null: not kept
  std::int64_t saved_group = 0;            // elements between directions of `saved`
  bool consume_saved = false;              // the gradients of the gates overwrite it
  bool parameters_alone = false;           // these gradients are there already

  Sequence d_output;                   // storage; absent for a layer below the last
  Sequence d_hidden;                   // storage; absent: zeros
  Sequence d_cell;                     // compute type; absent: zeros
  State d_h_n, d_c_n;                  // storage
  void* d_above = nullptr;             // [pairs, d_above_width], compute type: from the layer above
  std::int64_t d_above_width = 0;      // D·O of the layer
  void* d_below = nullptr;             // [pairs, I], compute type: to the layer below
  Sequence d_input;                    // storage: the first layer's instead of d_below
  void* d_h0 = nullptr;                // [D, B, O], storage
  void* d_c0 = nullptr;                // [D, B, H], storage
  Parameters* d_parameters = nullptr;  // [D]

  // The weights as the kernels read them. Null in forward: packed into scratch, or read in place.
  void* packed = nullptr;
  bool x_in_place = false;  // forward, not packed: W_ih is read in place (pack.h)
  bool h_in_place = false;  // W_hh and W_hr likewise
  void* scratch = nullptr;

  // ---- a part of a layer: some of the steps, in one direction (Options::recompute) ------------
  bool part = false;
  bool starts_sums = true, ends_sums = true;  // the first or last part that adds to the sums
  std::int64_t rows = 0;                      // B of the call, of which the part may have fewer
  // Sorted rows below these counts have steps before the part, and after it, in the order of the
  // walk.
  std::int64_t rows_before = 0, rows_after = 0;
  // The states before the part, of the rows with steps before it: storage and compute type.
  State h_before, c_before;
  // [B, Op] and [B, Hp], compute type, sorted rows: gradients of the states between parts. Read
  // for rows with steps after the part, then written for rows with steps before it.
  void *carry_h = nullptr, *carry_c = nullptr;
  void* d_input_before = nullptr;  // [pairs, I], compute type: dx of the other direction
};

// The kernels of one cell and storage type on one instruction set.
struct LayerKernels {
  int lanes;            // of a vector of compute type
  int depth;            // products that a lane of forward's micro-kernel adds in one instruction
  int rows_per_block;   // rows that one micro-kernel works on
  int units_per_block;  // hidden units of one block of packed weights
  std::size_t (*packed_size)(const Layer&);
  std::size_t (*forward_scratch)(const Layer&);
  std::size_t (*backward_scratch)(const Layer&);
  void (*pack)(const Layer&, int thread, int threads);
  void (*forward)(const Layer&, int thread, int threads);
  void (*backward)(const Layer&, int thread, int threads);
  void (*unpack)(const Layer&, int thread, int threads);  // of int8 alone: to Layer::parameters
};

// The kernels of one cell, in the order of DType.
struct CellKernels {
  LayerKernels of[4];
};

// Loops that measure the limits of one thread (roof.h).
struct MultiplyAdd {
  int flops;  // of one round
  double (*run)(std::int64_t rounds);
};
struct RoofLoops {
  MultiplyAdd multiply_add[2];  // f32, f64
  double (*read)(const float* x, std::int64_t count, std::int64_t passes);
};

struct ProgramKernels;  // program_plan.h

// The cells on one instruction set, in the order of AllCells.
struct InstructionSet {
  const char* name;
  const CellKernels* kernels;
  RoofLoops roof;
  const LayerKernels* int8;
  // The set that this one extends: kernels that this one lacks, of a storage type or all of a kind
  // (null), are those of the base. Null: this one has all.
  const InstructionSet* base = nullptr;
  const ProgramKernels* programs = nullptr;
};

// One for each program_*.cpp.
extern const ProgramKernels portable_programs;
extern const ProgramKernels avx2_programs;
extern const ProgramKernels avx512_programs;
extern const ProgramKernels neon_programs;

// One for each isa_*.cpp.
extern const InstructionSet portable_set;
extern const InstructionSet avx2_set;
extern const InstructionSet avxvnni_set;
extern const InstructionSet avx512_set;
extern const InstructionSet avx512vnni_set;
extern const InstructionSet avx512bf16_set;
extern const InstructionSet neon_set;

// The set in use (isa.h: cpu_isa).
const InstructionSet& chosen_set();

}  // namespace fastrnn
