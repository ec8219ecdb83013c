// A stack of programs, one for each layer, run one step at a time: for streams of layers with
// options.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "../program.h"
#include "dlpack.h"
#include "memory.h"

namespace fastrnn::bind {

namespace py = pybind11;

// What a step reads and writes. h is (L, B, O) of storage type, c (L, B, H) of compute type, each
// contiguous.
struct ProgramStep {
  const void* x;  // (B, I) of storage type, at x[b·x_row + i·x_unit]
  std::int64_t x_row, x_unit;
  const void *h, *c;  // before the step
  void *h_n, *c_n;    // after it; c and c_n null where there is no c
  void* output;       // (B, O) of storage type: h_n of the last layer
};

class ProgramSteps {
 public:
  // Empty: no other method may be called.
  ProgramSteps() = default;
  // programs: for each layer its `_C.Program` and its shared arrays. A program's sequences are x
  // and h, its states h and, where there is one, c.
  ProgramSteps(py::handle programs, std::int64_t batch_size, dlpack::DataType storage);

  bool empty() const { return layers_.empty(); }
  DType dtype() const { return layers_[0].program->text().dtype; }
  std::int64_t hidden_size() const { return layers_[0].program->states.back(); }
  // Bytes of the workspace of `run`, on at most `threads` threads.
  std::size_t workspace_size(int threads);
  void run(const ProgramStep& step, int threads, void* workspace);

 private:
  struct Layer {
    py::object program_object;
    const Program* program;
    std::vector<py::object> held;
    std::vector<const void*> shared;
  };

  ProgramCall call_of(const Layer& layer, int threads) const;
  const void* wide_x(const ProgramStep& step, std::int64_t* row);

  std::vector<Layer> layers_;
  std::int64_t rows_ = 0;
  dlpack::DataType storage_{};
  // Of compute type: x; for half types a layer's h before the step, and after it, for layers in
  // turn; the output of a layer.
  Memory x_, h_, h_n_[2], y_;
};

}  // namespace fastrnn::bind
