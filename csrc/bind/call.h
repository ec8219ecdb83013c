// One call of the engine, from Python's arguments to a Problem: the only place that checks the
// arrays of a call, allocates its results and runs it.
//
// The order: check every argument, fill the Problem, allocate the results, get a workspace, release
// the GIL, run.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "argument.h"
#include "backend.h"
#include "frozen.h"
#include "memory.h"
#include "options.h"
#include "problem.h"

namespace fastrnn::bind {

namespace py = pybind11;

// The argument `threads` of a call: 0 stands for openmp::max_threads(). ValueError below 0.
int checked_threads(int threads);

// For tests: every byte of a new array in host memory is `byte`, so that elements that the engine
// leaves unwritten show; -1: as allocated. Returns the value before.
int fill_new_arrays(int byte);

// The arrays that both passes read; each may be None except input and weights.
struct Inputs {
  py::handle input;        // (T, B, I); packed (N, I); of a cell (B, I)
  py::handle h0, c0;       // (L·D, B, ·); of a cell (B, ·)
  py::handle weights;      // the flat list; of int8 options one array, the packed weights (int8.h)
  py::handle batch_sizes;  // int64 (T,): the data are packed
  py::handle lengths;      // int64 (B,)
  py::handle reset;        // bool (T, B)
  py::handle reset_hx;     // (h, c) after a reset, of forward alone: (L·D, ·) each; or None
};

// The results of forward: None where not wanted.
struct Results {
  py::object output, h_n, c_n, hidden, cell, saved;
};

// The gradients of the results; None: zeros.
struct Cotangents {
  py::handle output, hidden, cell, h_n, c_n;
};

// What a call on a CUDA device needs besides; the defaults on a CPU.
struct Device {
  py::object workspace = py::none();  // a function: bytes -> array
  std::uintptr_t stream = 0;          // a cudaStream_t
  bool allow_tf32 = false, persistent = false;
};

// The arrays of an ensemble, in the order in which a call reads them: borrowed once; each member
// takes its part along the leading axis.
struct Members {
  std::int64_t count;
  std::vector<Array> arrays;
  Owners owners;
};

// A flat list of parameters, each kept alive: another thread may change the list while the engine
// runs.
class List {
 public:
  List(py::handle object, const char* argument);
  std::int64_t size() const { return PyTuple_GET_SIZE(items_.ptr()); }
  py::handle operator[](std::int64_t i) const { return PyTuple_GET_ITEM(items_.ptr(), i); }
  const py::object& items() const { return items_; }  // a tuple

 private:
  py::object items_;
};

class Call {
 public:
  // `cell`: one step of one layer and direction, without the axes of steps and layers. With
  // `members`: call number `index` of them, made in this order.
  Call(const CheckedOptions& checked, int threads, bool cell = false, Members* members = nullptr,
       std::int64_t index = 0);

  // Check and fill; both return *this. The arrays must live until the call is over: hold() keeps
  // references to them.
  Call& set_inputs(const Inputs& inputs);
  void hold(py::object objects) { held_ = std::move(objects); }
  Call& set_frozen(py::handle weights, Frozen& frozen);  // use packed weights that still match

  // `states`: hidden and cell are wanted; `save`: what backward reads; `zeros`: parts of `saved`
  // that the engine never writes are zeros, since a torch operator must be deterministic.
  Results forward(bool states, bool save, bool zeros, const Device& device);

  // The gradients of input, h0, c0 and each weight, None where not needed.
  py::list backward(const Results& saved, const Cotangents& cotangents, const py::tuple& needs,
                    bool consume_saved, const Device& device);

  // The gradients of the weights alone, where `saved` holds those of the gates already.
  py::list parameter_gradients(py::handle saved, const py::tuple& needs);

  static Results forward_members(const std::vector<Call*>& calls, bool states, bool save,
                                 bool zeros);
  static py::list backward_members(const std::vector<Call*>& calls, const Results& saved,
                                   const Cotangents& cotangents, const py::tuple& needs);

  // Checks input (T, B, I) and weights alone: what packing needs.
  void set_weights_for(py::handle input, py::handle weights);
  bool on_host() const { return input_->host(); }
  bool cell() const { return cell_; }
  const Problem& problem() const { return problem_; }
  const std::vector<Array>& weights() const { return weights_; }

 private:
  Array array(py::handle object, const Name& name);
  bool packed() const { return problem_.batch_sizes != nullptr; }
  std::int64_t output_size() const;  // O
  std::int64_t groups() const { return L_ * D_; }
  void expect_absent(py::handle object, const char* name) const;
  const std::int64_t* kept(const Array& a, std::int64_t count);

  void set_input(py::handle input, py::handle batch_sizes);
  void set_batch_sizes(py::handle batch_sizes, std::int64_t rows);
  void set_weights(py::handle weights);
  void set_int8(const List& list);
  Parameters parameters(const List& list, std::int64_t group);

  void set_rows(py::handle lengths, py::handle reset);
  void set_states(py::handle h0, py::handle c0);
  void set_reset_states(py::handle reset_hx);
  State state(py::handle object, const char* name, std::int64_t units);
  State reset_state(py::handle object, const char* name, std::int64_t units);

  Shape sequence_shape(std::int64_t layers, std::int64_t units) const;  // layers 0: no axis of them
  Shape state_shape(std::int64_t units) const;
  void* read(py::handle object, const char* name, dlpack::DataType dtype, const Shape& shape);
  Sequence layers_gradient(py::handle object, const char* name, dlpack::DataType dtype,
                           std::int64_t units, std::int64_t& layer_stride);
  void set_saved(const Results& saved, bool consume);
  void set_gates(py::handle saved, bool consume);
  void set_cotangents(const Cotangents& cotangents);

  // A new array for the caller; `data` is where this call writes to it.
  struct Made {
    py::object object;
    char* data = nullptr;
    std::size_t bytes = 0;  // of one member
  };
  Made make(const Shape& shape, dlpack::DataType dtype, bool zeros = false);
  void* part(const Made& made) const;
  Parameters gradients_of(const Made* made, const Parameters& of) const;

  static Results allocate(const std::vector<Call*>& calls, bool states, bool save, bool zeros);
  static py::list allocate_gradients(const std::vector<Call*>& calls, const py::tuple& needs);
  void check_device() const;
  void check_gradient() const;
  const Backend& backend() const;
  void run(Pass pass, const Device& device);
  static void run_together(const std::vector<Call*>& calls, Pass pass);
  static bool same_weights(const Call& a, const Call& b);

  Problem problem_;
  CellTraits traits_;
  bool cell_;
  Members* members_;  // null: a call by itself
  std::int64_t index_;
  std::size_t next_ = 0;  // the next of the members' arrays
  std::int64_t L_, D_, N_ = 0;
  std::int64_t per_group_ = 0;  // parameters of one layer and direction
  bool has_biases_ = false;     // among them
  dlpack::DataType storage_{}, compute_{};
  py::handle like_;                       // the input, whose kind new arrays have
  std::vector<std::int64_t> row_counts_;  // lengths or batch_sizes, never both
  std::vector<Parameters> parameters_, d_parameters_;
  std::optional<Array> input_;
  py::object held_;          // keeps the arrays alive
  py::object held_weights_;  // as they were: a list may change while the engine runs
  std::vector<Array> weights_;
  std::shared_ptr<const Memory> packed_;
  Owners owners_;
};

}  // namespace fastrnn::bind
