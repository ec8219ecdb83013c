// `_C.Stream`: a stack fed one step at a time. The weights are packed once; states, output and
// scratch belong to the stream, and a step allocates nothing.
//
// States   two of each, read and written in turn. h is of storage type, c of compute type, as in a
//          call of the whole sequence, so that the steps give its bits.
// Output   one buffer, written by every step. A step returns a view of it, made once for each type
//          of input array: torch tensors, NumPy arrays, fastrnn.Tensor.
// Threads  one step at a time. A large step releases the GIL; another call meanwhile is an error.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "argument.h"
#include "memory.h"
#include "options.h"
#include "problem.h"
#include "program_steps.h"
#include "tensor.h"

namespace fastrnn::bind {

class Stream {
 public:
  // Of int8 options, `weights` are float32, or one array of packed weights (int8.h), which is used
  // where it is. dtype: of the arrays. threads: a function that returns how many a step may use, or
  // None for OpenMP's number. view(output, x): what a step returns for arrays of x's type.
  // programs: None, or for each layer its `_C.Program` and its shared arrays, which replace the
  // weights: for options that the fused cells do not have.
  Stream(const CheckedOptions& options, py::handle weights, std::int64_t batch_size,
         const std::string& dtype, py::object threads, py::object view, py::handle programs);

  // Packs the weights again; their shapes and dtype must not change.
  void pack(py::handle weights, py::handle programs);
  // From x (B, I) to a view of the output (B, O).
  py::object step(py::handle x);
  // Sets the rows where `mask` (B,) is true, or all for None, to the initial state.
  void reset(py::handle mask);
  // Copies of h (L, B, O) and, where there is a c, of c (L, B, H).
  py::tuple state() const;
  void set_state(py::handle h, py::handle c);
  // Sets the state that reset() writes, (L, 1, O) and (L, 1, H). None: zeros.
  void set_initial(py::handle h, py::handle c);

  std::int64_t input_size() const { return problem_.I; }
  std::int64_t hidden_size() const { return problem_.H; }
  const Tensor& output() const { return output_; }

 private:
  // For one type of input arrays.
  struct View {
    py::object type, output;
    bool buffer;     // it has the buffer protocol
    bool negatable;  // it is torch's: a negation may be pending
  };
  struct Place {
    const void* data;
    std::int64_t row, unit;  // strides in elements
  };
  class Reading;

  void expect_idle() const;
  void run_programs();
  void expect_hidden_size(std::int64_t H) const;
  View view_of(py::handle x);
  void make_output(View& view, py::handle x);
  Place apart_from_output(const Place& x);
  void set_threads();
  void run();

  std::int64_t layers() const { return problem_.options.layers; }
  std::int64_t output_size() const {  // O
    return problem_.options.proj_size > 0 ? problem_.options.proj_size : problem_.H;
  }
  bool has_c() const { return options_.traits.states > 1; }
  bool half() const { return item_ < c_item_; }

  CheckedOptions options_;
  Problem problem_;
  dlpack::DataType storage_, compute_;
  std::size_t item_, c_item_;  // bytes of an element of storage and of compute type
  char format_;                // of the buffer protocol; 0: it has none
  bool large_ = false;         // worth releasing the GIL
  bool busy_ = false;
  int now_ = 0;  // which of the two states is the current one
  Memory packed_, workspace_, h_[2], c_[2], narrow_c_, initial_h_, initial_c_, staged_;
  ProgramSteps programs_;
  Tensor output_;
  py::object threads_, view_, given_;  // given_: packed weights of the caller's
  std::vector<View> views_;
};

}  // namespace fastrnn::bind
