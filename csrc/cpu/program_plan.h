// A run of a program as the kernels of an instruction set see it: plain arrays, no container.
#pragma once

#include "../program.h"
#include "threads.h"

namespace fastrnn {

template <class T>
struct ListOf {
  const T* data = nullptr;
  std::int64_t count = 0;
};

struct CollectTable {
  ListOf<Piece> pieces;
  const std::int64_t *starts = nullptr, *indices = nullptr;
};

struct ProgramPlan {
  const ProgramCall* call = nullptr;
  ListOf<ProgramValue> values;
  ListOf<Instruction> phases[kPhases];
  ListOf<int> used[kPhases];
  ListOf<PointOp> points;
  ListOf<double> constants;
  ListOf<CollectTable> tables;
  ListOf<PairSum> sums;
  ListOf<std::int64_t> states;  // widths
  ListOf<Gap> gaps;
  std::int64_t gradients = 0;  // of the caller's arrays
  bool before_first = false, after_last = false;

  std::int64_t block_steps = 1;  // steps of a block
  std::int64_t chunk = 1;        // pairs that run through a phase together
  int threads = 1;
  bool share_columns = false;  // the threads divide a step's columns, else the rows
  Barrier* barrier = nullptr;
};

struct ProgramKernels {
  struct Of {
    int lanes;
    std::size_t (*scratch)(const ProgramPlan&);
    void (*lay_out)(const ProgramPlan&, void* scratch);  // once, before any thread runs
    // `threads`: plan.threads, or 1.
    void (*run)(const void* scratch, int thread, int threads);
  } of[2];  // f32, f64
};

}  // namespace fastrnn
