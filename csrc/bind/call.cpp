// The order of each entry point: check every argument → fill the Problem → workspace → let the GIL
// go → the engine. Nothing that is not checked here reaches the engine, except that outputs overlap
// no input, which is the caller's.

#include "call.h"

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "argument.h"
#include "backend.h"
#include "dtype.h"
#include "frozen.h"
#include "gil.h"
#include "memory.h"
#include "options.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fastrnn::bind {
namespace {

Sequence sequence_of(const Array& array, int step) {  // the axis of the steps
  const bool padded = array.ndim() == step + 3;
  return {array.data(), padded ? array.stride(step) : 0, array.stride(padded ? step + 1 : step),
          array.stride(padded ? step + 2 : step + 1)};
}

State state_of(const Array& array) {
  return {array.data(), array.stride(0), array.stride(1), array.stride(2)};
}

Weight weight_of(const Array& array) {
  if (array.ndim() == 1) return {array.data(), 0, array.stride(0)};
  if (array.ndim() == 3)
    return {array.data(), array.stride(1), array.stride(2), array.stride(0)};  // of several heads
  return {array.data(), array.stride(0), array.stride(1)};
}

DType storage_of(const Array& input) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (same(input.dtype(), data_type(dtype))) return dtype;
  throw py::type_error("input: expected dtype float32, float64, bfloat16 or float16, got " +
                       type_name(input.dtype()));
}

// A flat list of parameters, each held: another thread may change the list while the engine runs.
class List {
 public:
  List(py::handle object, const char* argument)
      : items_(py::reinterpret_steal<py::object>(PySequence_Tuple(object.ptr()))) {
    if (!items_) {
      PyErr_Clear();
      throw py::type_error(std::string(argument) + ": expected a list of arrays, got " +
                           Py_TYPE(object.ptr())->tp_name);
    }
  }
  std::int64_t size() const { return PyTuple_GET_SIZE(items_.ptr()); }
  py::handle operator[](std::int64_t i) const { return PyTuple_GET_ITEM(items_.ptr(), i); }

 private:
  py::object items_;
};

// The arrays of an ensemble, in the order in which a call asks for them: borrowed once, after which
// each member takes its part, found by the leading axis.
struct Members {
  std::int64_t count;
  std::vector<Array> arrays;
  Owners owners;
};

// ---- the Problem, filled and checked ------------------------------------------------------------

class Call {
 public:
  // With `members` the call of number `index` among them; the calls before it are filled by then.
  Call(const CheckedOptions& checked, int threads, Members* members = nullptr,
       std::int64_t index = 0)
      : traits_(checked.traits), members_(members), index_(index) {
    problem_.options = checked.options;
    L_ = checked.options.layers;
    D_ = checked.options.directions;
    if (threads < 0)
      throw py::value_error("threads: expected 0 (the default) or more, got " +
                            std::to_string(threads));
    problem_.threads = threads > 0 ? threads : max_threads();
  }

  // In this order: each sets sizes that the next one checks against.
  void set_input(py::handle input, py::handle batch_sizes);
  void set_weights(py::handle weights);
  // The weights as they were packed when the layer was frozen, where they are the same.
  void use_frozen(py::handle weights, Frozen& frozen);
  void set_rows(py::handle lengths, py::handle reset);
  void set_states(py::handle h0, py::handle c0);
  void set_reset_states(py::handle reset_hx);
  void set_finals(py::handle h_n, py::handle c_n);
  void set_results(py::handle hidden, py::handle cell, py::handle gates, bool all_layers,
                   bool written);

  void set_output(py::handle output);

  void set_gradients(py::handle d_output, py::handle d_hidden, py::handle d_cell, py::handle d_h_n,
                     py::handle d_c_n);
  void set_wanted(py::handle d_input, py::handle d_h0, py::handle d_c0, py::handle d_weights);

  void consume_gates(bool consume) { problem_.consume_gates = consume; }
  // `workspace`: an array, or a function that gives one for a number of bytes. `stream`: a
  // cudaStream_t as an integer.
  void run(Pass pass, py::handle workspace, std::uintptr_t stream, bool allow_tf32,
           bool persistent);
  CheckedWeights checked_weights() {
    return {problem_, std::move(parameters_), std::move(weights_), std::move(owners_)};
  }
  static void run_together(const std::vector<Call>& calls, Pass pass);

 private:
  // On the device of the input, which is the first; of members in host memory.
  Array array(py::handle object, const Name& name) {
    if (members_ == nullptr) {
      Array a(object, name, owners_);
      if (input_) a.expect_with(*input_);
      return a;
    }
    if (index_ == 0) members_->arrays.emplace_back(object, name, members_->owners).expect_host();
    return members_->arrays.at(asked_++).member(index_, members_->count);
  }
  bool host() const { return input_->host(); }
  static bool same_weights(const Call& a, const Call& b);
  void* result(py::handle object, const char* name, dlpack::DataType dtype, Shape shape,
               bool written);
  void* wanted(py::handle object, const char* name, Shape shape);
  State state(py::handle object, const char* name, std::int64_t units);
  State reset_state(py::handle object, const char* name, std::int64_t units);
  const Backend& backend() const;
  void expect_kernels_for_options() const;
  Parameters parameters(const List& list, const char* argument, std::int64_t group, bool written);
  void set_batch_sizes(py::handle batch_sizes, std::int64_t rows);
  void expect_absent(py::handle object, const char* name) const;
  // (steps, rows, units) of padded data, (rows, units) of packed data, after a leading axis, which
  // may be left out where it is 1.
  void* sequence_result(py::handle object, const char* name, dlpack::DataType dtype,
                        std::int64_t leading, std::int64_t units, bool written);
  Sequence layers_gradient(py::handle object, const char* name, dlpack::DataType dtype,
                           std::int64_t units, std::int64_t& layer_stride);

  // A copy of `count` values: what was checked is what the engine reads, whatever another thread
  // does to the array meanwhile.
  const std::int64_t* kept(const Array& a, std::int64_t count) {
    const auto* values = static_cast<const std::int64_t*>(a.data());
    row_counts_.assign(values, values + count);
    row_counts_.push_back(0);  // an empty one is not "not given"
    return row_counts_.data();
  }

  bool packed() const { return problem_.batch_sizes != nullptr; }
  std::int64_t output_size() const {  // O
    return problem_.options.proj_size > 0 ? problem_.options.proj_size : problem_.H;
  }

  Problem problem_;
  CellTraits traits_;
  Members* members_;  // null: a call by itself
  std::int64_t index_;
  std::size_t asked_ = 0;  // of the members' arrays
  std::int64_t L_, D_, N_ = 0;
  std::int64_t per_group_ = 0;  // parameters of one layer and direction
  bool has_biases_ = false;     // among them
  dlpack::DataType storage_{}, compute_{};
  std::vector<std::int64_t> row_counts_;  // lengths or batch_sizes, of which there is one at most
  std::vector<Parameters> parameters_, d_parameters_;
  std::optional<Array> input_;
  std::vector<Array> weights_;
  std::shared_ptr<const Memory> packed_;
  Owners owners_;
};

void Call::expect_absent(py::handle object, const char* name) const {
  if (!object.is_none())
    throw py::value_error(std::string(name) + ": expected None for the " + problem_.options.cell +
                          " cell, which has no c, got " + Py_TYPE(object.ptr())->tp_name);
}

void Call::set_batch_sizes(py::handle batch_sizes, std::int64_t rows) {
  const Array sizes(batch_sizes, {"batch_sizes"}, owners_);  // those of every member
  sizes.expect_host()
      .expect_dtype({dlpack::kInt, 64, 1})
      .expect_axes(1, "one axis (T,)")
      .expect_contiguous();
  problem_.T = sizes.shape(0);
  const std::int64_t* values = problem_.batch_sizes = kept(sizes, problem_.T);
  problem_.B = problem_.T > 0 ? values[0] : 0;
  std::int64_t before = std::numeric_limits<std::int64_t>::max();
  std::int64_t left = rows;
  for (std::int64_t t = 0; t < problem_.T; ++t) {
    if (values[t] < 1 || values[t] > before)
      sizes.complain("values of 1 or more that never increase",
                     std::to_string(values[t]) + " at step " + std::to_string(t));
    if (values[t] > left) break;
    before = values[t];
    left -= values[t];
    if (t + 1 == problem_.T && left == 0) return;
  }
  sizes.complain("values that add up to the rows of input, " + std::to_string(rows),
                 problem_.T > 0 ? "others" : "none");
}

void Call::set_input(py::handle input, py::handle batch_sizes) {
  const Array& x = input_.emplace(array(input, {"input"}));
  problem_.device = x.cuda_device();
  problem_.dtype = storage_of(x);
  storage_ = data_type(problem_.dtype);
  compute_ = data_type(problem_.dtype == DType::f64 ? DType::f64 : DType::f32);
  if (batch_sizes.is_none()) {
    x.expect_axes(3, "three axes (T, B, I)");
    if (x.shape(0) < 1) x.complain("at least one step", "none");
    problem_.T = x.shape(0);
    problem_.B = x.shape(1);
    problem_.I = x.shape(2);
    N_ = problem_.T * problem_.B;
  } else {
    x.expect_axes(2, "two axes (N, I) with batch_sizes");
    N_ = x.shape(0);
    problem_.I = x.shape(1);
    set_batch_sizes(batch_sizes, N_);
  }
  problem_.input = sequence_of(x, 0);
}

Parameters Call::parameters(const List& list, const char* argument, std::int64_t group,
                            bool written) {
  const std::int64_t rows = traits_.gates * problem_.H, out = output_size();
  const std::int64_t layer = group / D_, in = layer == 0 ? problem_.I : D_ * out;
  std::int64_t index = group * per_group_;
  const auto next = [&](const char* parameter, Shape shape) -> Weight {
    const std::int64_t i = index++;
    if (written && list[i].is_none()) return {};
    const Array a = array(list[i], {argument, i, parameter, layer, group % D_ == 1});
    a.expect_shape(shape).expect_dtype(storage_);
    if (written)
      a.expect_writable().expect_contiguous();
    else
      weights_.push_back(a);
    return weight_of(a);
  };
  const CellOptions& maths = problem_.options.maths;
  const std::int64_t heads = maths.heads, H = problem_.H;
  Parameters group_parameters;
  group_parameters.weight_ih = next("weight_ih", {rows, in});
  group_parameters.weight_hh = heads == 1 ? next("weight_hh", {rows, out})
                                          : next("weight_hh", {heads, rows / heads, out / heads});
  if (has_biases_) {
    group_parameters.bias_ih = next("bias_ih", {rows});
    group_parameters.bias_hh = next("bias_hh", {rows});
  }
  if (problem_.options.proj_size > 0) group_parameters.weight_hr = next("weight_hr", {out, H});
  return group_parameters;
}

void Call::set_weights(py::handle weights) {
  const List list(weights, "weights");
  const CellOptions& maths = problem_.options.maths;
  const std::int64_t groups = L_ * D_;
  const std::int64_t least = 2 + (problem_.options.proj_size > 0 ? 1 : 0);
  per_group_ = list.size() / groups;
  has_biases_ = per_group_ == least + 2;
  if (list.size() % groups != 0 || (per_group_ != least && !has_biases_))
    throw py::value_error("weights: expected " + std::to_string(groups * (least + 2)) +
                          " arrays, or " + std::to_string(groups * least) +
                          " without biases, got " + std::to_string(list.size()));
  const Array recurrent = array(list[1], {"weights", 1, "weight_hh", 0, false});
  const bool split = maths.heads > 1;
  recurrent.expect_axes(split ? 3 : 2, split ? "three axes (heads, ., .)" : "two axes");
  const std::int64_t rows = split ? recurrent.shape(0) * recurrent.shape(1) : recurrent.shape(0);
  problem_.H = rows / traits_.gates;
  if (problem_.H < 1 || rows % traits_.gates != 0)
    recurrent.complain("rows for " + std::to_string(traits_.gates) + " gates",
                       std::to_string(rows) + " rows");
  if (problem_.H % maths.heads != 0)
    throw py::value_error("heads: expected a divisor of the hidden size, " +
                          std::to_string(problem_.H) + ", got " + std::to_string(maths.heads));
  if (output_size() > problem_.H)
    throw py::value_error("proj_size: expected at most the hidden size, " +
                          std::to_string(problem_.H) + ", got " + std::to_string(output_size()));
  parameters_.reserve(static_cast<std::size_t>(groups));
  for (std::int64_t group = 0; group < groups; ++group)
    parameters_.push_back(parameters(list, "weights", group, false));
  problem_.parameters = parameters_.data();
}

void Call::use_frozen(py::handle weights, Frozen& frozen) {
  if (!host()) return;
  const List list(weights, "weights");
  std::vector<py::object> objects;
  for (std::int64_t i = 0; i < list.size(); ++i)
    objects.push_back(py::reinterpret_borrow<py::object>(list[i]));
  packed_ = frozen.find(problem_, objects.data(), weights_);
  if (packed_) problem_.packed = packed_->data();
}

void Call::set_rows(py::handle lengths, py::handle reset) {
  if (!lengths.is_none()) {
    if (packed()) throw py::value_error("lengths: expected None with batch_sizes");
    const Array a = array(lengths, {"lengths"});
    a.expect_dtype({dlpack::kInt, 64, 1}).expect_shape({problem_.B}).expect_contiguous();
    problem_.lengths = host() ? kept(a, problem_.B) : static_cast<const std::int64_t*>(a.data());
    for (std::int64_t b = 0; host() && b < problem_.B; ++b)
      if (problem_.lengths[b] < 0 || problem_.lengths[b] > problem_.T)
        a.complain("values from 0 to the number of steps, " + std::to_string(problem_.T),
                   std::to_string(problem_.lengths[b]) + " in row " + std::to_string(b));
  }
  if (!reset.is_none()) {
    if (packed()) throw py::value_error("reset: expected None with batch_sizes");
    const Array a = array(reset, {"reset"});
    a.expect_dtype({dlpack::kBool, 8, 1}).expect_shape({problem_.T, problem_.B});
    problem_.reset = static_cast<const bool*>(a.data());
    problem_.reset_step = a.stride(0);
    problem_.reset_row = a.stride(1);
  }
}

State Call::state(py::handle object, const char* name, std::int64_t units) {
  if (object.is_none()) return {};
  return state_of(
      array(object, {name}).expect_shape({L_ * D_, problem_.B, units}).expect_dtype(storage_));
}

void Call::set_states(py::handle h0, py::handle c0) {
  problem_.h0 = state(h0, "h0", output_size());
  if (traits_.states < 2) return expect_absent(c0, "c0");
  problem_.c0 = state(c0, "c0", problem_.H);
}

State Call::reset_state(py::handle object, const char* name, std::int64_t units) {
  if (object.is_none()) return {};
  const Array a = array(object, {name});
  a.expect_shape({L_ * D_, units}).expect_dtype(storage_);
  return {a.data(), a.stride(0), 0, a.stride(1)};
}

void Call::set_reset_states(py::handle reset_hx) {
  if (reset_hx.is_none()) return;
  const List list(reset_hx, "reset_hx");
  if (list.size() != 2)
    throw py::value_error("reset_hx: expected (reset_h, reset_c), got " +
                          std::to_string(list.size()) + " values");
  problem_.reset_h = reset_state(list[0], "reset_h", output_size());
  if (traits_.states < 2) return expect_absent(list[1], "reset_c");
  problem_.reset_c = reset_state(list[1], "reset_c", problem_.H);
}

void* Call::result(py::handle object, const char* name, dlpack::DataType dtype, Shape shape,
                   bool written) {
  const Array a = array(object, {name});
  a.expect_shape(shape).expect_dtype(dtype).expect_contiguous();
  if (written) a.expect_writable();
  return a.data();
}

void* Call::sequence_result(py::handle object, const char* name, dlpack::DataType dtype,
                            std::int64_t leading, std::int64_t units, bool written) {
  if (leading == 1 && array(object, {name}).ndim() == (packed() ? 2 : 3))  // of one layer
    return packed() ? result(object, name, dtype, {N_, units}, written)
                    : result(object, name, dtype, {problem_.T, problem_.B, units}, written);
  if (packed()) return result(object, name, dtype, {leading, N_, units}, written);
  return result(object, name, dtype, {leading, problem_.T, problem_.B, units}, written);
}

void Call::set_finals(py::handle h_n, py::handle c_n) {
  const std::int64_t groups = L_ * D_, B = problem_.B;
  problem_.h_n = result(h_n, "h_n", storage_, {groups, B, output_size()}, true);
  if (traits_.states < 2) return expect_absent(c_n, "c_n");
  problem_.c_n = result(c_n, "c_n", storage_, {groups, B, problem_.H}, true);
}

void Call::set_results(py::handle hidden, py::handle cell, py::handle gates, bool all_layers,
                       bool written) {
  const std::int64_t H = problem_.H, out = output_size();
  problem_.all_layers = all_layers;
  problem_.hidden =
      sequence_result(hidden, "hidden", storage_, all_layers ? L_ : 1, D_ * out, written);
  if (traits_.states < 2)
    expect_absent(cell, "cell");
  else if (!cell.is_none())
    problem_.cell = sequence_result(cell, "cell", compute_, L_, D_ * H, written);
  const bool no_cell = traits_.states >= 2 && problem_.cell == nullptr;
  const bool recompute = problem_.options.recompute;
  if (recompute && !written && no_cell)
    throw py::value_error("cell: expected the one that forward kept, got None");
  if (gates.is_none() && !written && !recompute)
    throw py::value_error("gates: expected those that forward saved, got None");
  if (gates.is_none()) return;
  const std::int64_t planes = traits_.saved_planes * padded(H);
  void* data =
      result(gates, "gates", compute_, {L_ * D_, N_, planes}, written || problem_.consume_gates);
  if (planes > 0) problem_.gates = data;
  if (!all_layers) throw py::value_error("all_layers: expected True with gates, got False");
  if (no_cell) throw py::value_error("cell: expected an array with gates, got None");
}

void Call::set_output(py::handle output) {
  if (output.is_none()) return;
  if (!host())
    throw py::value_error(
        "output: expected None on a CUDA device, where `hidden` alone is written");
  problem_.output = sequence_result(output, "output", storage_, 1, D_ * output_size(), true);
}

Sequence Call::layers_gradient(py::handle object, const char* name, dlpack::DataType dtype,
                               std::int64_t units, std::int64_t& layer_stride) {
  if (object.is_none()) return {};
  const Array a = array(object, {name});
  if (packed())
    a.expect_shape({L_, N_, units});
  else
    a.expect_shape({L_, problem_.T, problem_.B, units});
  a.expect_dtype(dtype);
  layer_stride = a.stride(0);
  return sequence_of(a, 1);
}

void Call::set_gradients(py::handle d_output, py::handle d_hidden, py::handle d_cell,
                         py::handle d_h_n, py::handle d_c_n) {
  const std::int64_t out = output_size();
  if (!d_output.is_none()) {
    const Array a = array(d_output, {"d_output"});
    if (packed())
      a.expect_shape({N_, D_ * out});
    else
      a.expect_shape({problem_.T, problem_.B, D_ * out});
    problem_.d_output = sequence_of(a.expect_dtype(storage_), 0);
  }
  problem_.d_hidden =
      layers_gradient(d_hidden, "d_hidden", storage_, D_ * out, problem_.d_hidden_layer);
  problem_.d_h_n = state(d_h_n, "d_h_n", out);
  if (traits_.states < 2) {
    expect_absent(d_cell, "d_cell");
    expect_absent(d_c_n, "d_c_n");
  } else {
    problem_.d_cell =
        layers_gradient(d_cell, "d_cell", compute_, D_ * problem_.H, problem_.d_cell_layer);
    problem_.d_c_n = state(d_c_n, "d_c_n", problem_.H);
  }
}

void* Call::wanted(py::handle object, const char* name, Shape shape) {
  return object.is_none() ? nullptr : result(object, name, storage_, shape, true);
}

void Call::set_wanted(py::handle d_input, py::handle d_h0, py::handle d_c0, py::handle d_weights) {
  const std::int64_t groups = L_ * D_, B = problem_.B;
  problem_.d_input = packed() ? wanted(d_input, "d_input", {N_, problem_.I})
                              : wanted(d_input, "d_input", {problem_.T, B, problem_.I});
  problem_.d_h0 = wanted(d_h0, "d_h0", {groups, B, output_size()});
  if (traits_.states < 2)
    expect_absent(d_c0, "d_c0");
  else
    problem_.d_c0 = wanted(d_c0, "d_c0", {groups, B, problem_.H});
  if (d_weights.is_none()) return;
  const List list(d_weights, "d_weights");
  if (list.size() != groups * per_group_)
    throw py::value_error("d_weights: expected " + std::to_string(groups * per_group_) +
                          " arrays, as many as weights, got " + std::to_string(list.size()));
  d_parameters_.reserve(static_cast<std::size_t>(groups));
  for (std::int64_t group = 0; group < groups; ++group)
    d_parameters_.push_back(parameters(list, "d_weights", group, true));
  problem_.d_parameters = d_parameters_.data();
}

void Call::expect_kernels_for_options() const {
  const Problem& p = problem_;
  if (host() && p.options.maths.heads > 1)
    throw py::value_error("heads: expected 1 in host memory, where programs run more, got " +
                          std::to_string(p.options.maths.heads));
  if (!host() && (p.options.recompute || p.reset_h.data || p.reset_c.data))
    throw py::value_error(
        "options: expected none that the CUDA kernels do not know, got one of recompute, "
        "reset_hx");
}

const Backend& Call::backend() const {
  if (host()) return cpu_backend();
#ifdef FASTRNN_HAS_CUDA
  return cuda_backend();
#else
  input_->complain("host memory: this build has no kernels for CUDA",
                   "an array on cuda:" + std::to_string(input_->cuda_device()));
#endif
}

void Call::run(Pass pass, py::handle workspace, std::uintptr_t stream, bool allow_tf32,
               bool persistent) {
  const Backend& device = backend();
  expect_kernels_for_options();
  problem_.stream = reinterpret_cast<void*>(stream);
  problem_.allow_tf32 = allow_tf32;
  problem_.persistent = persistent;
  const std::size_t bytes = device.workspace_size(problem_, pass);
  py::object given = py::reinterpret_borrow<py::object>(workspace);
  if (PyCallable_Check(given.ptr())) given = given(bytes);
  if (given.is_none() && !host())
    throw py::value_error("workspace: expected " + std::to_string(bytes) +
                          " bytes on the device of input, got None");
  if (!given.is_none()) {
    const Array a = array(given, {"workspace"});
    a.expect_writable().expect_contiguous();
    const std::uintptr_t alignment = host() ? 64 : 256;  // what the device's library asks for
    if (a.bytes() < bytes || reinterpret_cast<std::uintptr_t>(a.data()) % alignment != 0)
      a.complain(std::to_string(bytes) + " bytes, " + std::to_string(alignment) + "-byte aligned",
                 std::to_string(a.bytes()) + " bytes");
    problem_.workspace = a.data();
  }
  const WithoutGil no_gil;
  const Scratch scratch(given.is_none() ? bytes : 0);
  if (given.is_none()) problem_.workspace = scratch.data();
  (pass == Pass::forward ? device.forward : device.backward)(problem_);
}

// Whether the parameters lie in the same place. Those of an ensemble lie apart by one stride each,
// so that two members tell of all.
bool Call::same_weights(const Call& a, const Call& b) {
  for (std::size_t i = 0; i < a.weights_.size(); ++i)
    if (a.weights_[i].data() != b.weights_[i].data()) return false;
  return true;
}

void Call::run_together(const std::vector<Call>& calls, Pass pass) {
  std::vector<Problem> problems;
  problems.reserve(calls.size());
  for (const Call& call : calls) problems.push_back(call.problem_);
  const auto count = static_cast<std::int64_t>(calls.size());
  const bool pack = pass == Pass::forward && count > 1 && same_weights(calls[0], calls[1]);
  const Backend& backend = cpu_backend();
  const WithoutGil no_gil;
  const Memory packed(pack ? backend.packed_size(problems[0]) : 0);
  if (pack) backend.pack(problems[0], packed.data());
  for (Problem& problem : problems) problem.packed = pack ? packed.data() : nullptr;
  const Scratch scratch(backend.ensemble_workspace_size(problems.data(), count, pass));
  problems[0].workspace = scratch.data();
  backend.run_ensemble(problems.data(), count, pass);
}

// ---- the entry points ---------------------------------------------------------------------------

using Arg = py::handle;

struct ForwardArguments {
  Arg input, h0, c0, weights, batch_sizes, lengths, reset, reset_hx;
  Arg hidden, h_n, c_n, cell, gates;
  bool all_layers;
  Arg output;
};

void fill(Call& call, const ForwardArguments& a) {
  call.set_input(a.input, a.batch_sizes);
  call.set_weights(a.weights);
  call.set_rows(a.lengths, a.reset);
  call.set_states(a.h0, a.c0);
  call.set_reset_states(a.reset_hx);
  call.set_finals(a.h_n, a.c_n);
  call.set_results(a.hidden, a.cell, a.gates, a.all_layers, true);
  call.set_output(a.output);
}

struct BackwardArguments {
  Arg input, h0, c0, weights, batch_sizes, lengths, reset, hidden, cell, gates;
  Arg d_output, d_hidden, d_cell, d_h_n, d_c_n;
  Arg d_input, d_h0, d_c0, d_weights;
  bool consume_gates;
};

void fill(Call& call, const BackwardArguments& a) {
  call.set_input(a.input, a.batch_sizes);
  call.set_weights(a.weights);
  call.set_rows(a.lengths, a.reset);
  call.set_states(a.h0, a.c0);
  call.consume_gates(a.consume_gates);
  call.set_results(a.hidden, a.cell, a.gates, true, false);
  call.set_gradients(a.d_output, a.d_hidden, a.d_cell, a.d_h_n, a.d_c_n);
  call.set_wanted(a.d_input, a.d_h0, a.d_c0, a.d_weights);
}

// Every member's call, then all of them in one run.
template <class Arguments>
void run_members(const CheckedOptions& options, std::int64_t count, const Arguments& arguments,
                 Pass pass, int threads) {
  if (count < 1) throw py::value_error("members: expected 1 or more, got " + std::to_string(count));
  Members members{count, {}, {}};
  std::vector<Call> calls;
  calls.reserve(static_cast<std::size_t>(count));
  for (std::int64_t index = 0; index < count; ++index)
    fill(calls.emplace_back(options, threads, &members, index), arguments);
  Call::run_together(calls, pass);
}

void forward(const CheckedOptions& options, Arg input, Arg h0, Arg c0, Arg weights, Arg batch_sizes,
             Arg lengths, Arg reset, Arg hidden, Arg h_n, Arg c_n, Arg cell, Arg gates,
             bool all_layers, int threads, Arg workspace, Frozen* frozen, Arg reset_hx,
             std::uintptr_t stream, bool allow_tf32, bool persistent, Arg output) {
  Call call(options, threads);
  fill(call, ForwardArguments{input, h0, c0, weights, batch_sizes, lengths, reset, reset_hx, hidden,
                              h_n, c_n, cell, gates, all_layers, output});
  if (frozen != nullptr) call.use_frozen(weights, *frozen);
  call.run(Pass::forward, workspace, stream, allow_tf32, persistent);
}

void forward_members(const CheckedOptions& options, std::int64_t members, Arg input, Arg h0, Arg c0,
                     Arg weights, Arg batch_sizes, Arg lengths, Arg reset, Arg hidden, Arg h_n,
                     Arg c_n, Arg cell, Arg gates, bool all_layers, int threads, Arg reset_hx,
                     Arg output) {
  run_members(options, members,
              ForwardArguments{input, h0, c0, weights, batch_sizes, lengths, reset, reset_hx,
                               hidden, h_n, c_n, cell, gates, all_layers, output},
              Pass::forward, threads);
}

void backward(const CheckedOptions& options, Arg input, Arg h0, Arg c0, Arg weights,
              Arg batch_sizes, Arg lengths, Arg reset, Arg hidden, Arg cell, Arg gates,
              Arg d_output, Arg d_hidden, Arg d_cell, Arg d_h_n, Arg d_c_n, Arg d_input, Arg d_h0,
              Arg d_c0, Arg d_weights, bool consume_gates, int threads, Arg workspace,
              std::uintptr_t stream, bool allow_tf32, bool persistent) {
  Call call(options, threads);
  fill(call, BackwardArguments{input,  h0,      c0,    weights,  batch_sizes, lengths,      reset,
                               hidden, cell,    gates, d_output, d_hidden,    d_cell,       d_h_n,
                               d_c_n,  d_input, d_h0,  d_c0,     d_weights,   consume_gates});
  call.run(Pass::backward, workspace, stream, allow_tf32, persistent);
}

void backward_members(const CheckedOptions& options, std::int64_t members, Arg input, Arg h0,
                      Arg c0, Arg weights, Arg batch_sizes, Arg lengths, Arg reset, Arg hidden,
                      Arg cell, Arg gates, Arg d_output, Arg d_hidden, Arg d_cell, Arg d_h_n,
                      Arg d_c_n, Arg d_input, Arg d_h0, Arg d_c0, Arg d_weights, int threads) {
  run_members(options, members,
              BackwardArguments{input,  h0,      c0,    weights,  batch_sizes, lengths, reset,
                                hidden, cell,    gates, d_output, d_hidden,    d_cell,  d_h_n,
                                d_c_n,  d_input, d_h0,  d_c0,     d_weights,   false},
              Pass::backward, threads);
}

}  // namespace

CheckedWeights check_weights(const CheckedOptions& options, py::handle input, py::handle weights) {
  Call call(options, 0);
  call.set_input(input, py::none());
  call.set_weights(weights);
  return call.checked_weights();
}

int max_threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Every argument may be given by position: naming one costs the dispatcher more than all the
// checks.
void register_call(py::module_& module) {
  using py::arg;
  module.def("forward", forward, arg("options"), arg("input"), arg("h0"), arg("c0"), arg("weights"),
             arg("batch_sizes"), arg("lengths"), arg("reset"), arg("hidden"), arg("h_n"),
             arg("c_n"), arg("cell"), arg("gates"), arg("all_layers"), arg("threads") = 0,
             arg("workspace") = py::none(), arg("frozen") = py::none(),
             arg("reset_hx") = py::none(), arg("stream") = 0, arg("allow_tf32") = false,
             arg("persistent") = false, arg("output") = py::none());
  module.def("backward", backward, arg("options"), arg("input"), arg("h0"), arg("c0"),
             arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"), arg("hidden"),
             arg("cell"), arg("gates"), arg("d_output"), arg("d_hidden"), arg("d_cell"),
             arg("d_h_n"), arg("d_c_n"), arg("d_input"), arg("d_h0"), arg("d_c0"), arg("d_weights"),
             arg("consume_gates") = false, arg("threads") = 0, arg("workspace") = py::none(),
             arg("stream") = 0, arg("allow_tf32") = false, arg("persistent") = false);
  module.def("forward_members", forward_members, arg("options"), arg("members"), arg("input"),
             arg("h0"), arg("c0"), arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"),
             arg("hidden"), arg("h_n"), arg("c_n"), arg("cell"), arg("gates"), arg("all_layers"),
             arg("threads") = 0, arg("reset_hx") = py::none(), arg("output") = py::none());
  module.def("backward_members", backward_members, arg("options"), arg("members"), arg("input"),
             arg("h0"), arg("c0"), arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"),
             arg("hidden"), arg("cell"), arg("gates"), arg("d_output"), arg("d_hidden"),
             arg("d_cell"), arg("d_h_n"), arg("d_c_n"), arg("d_input"), arg("d_h0"), arg("d_c0"),
             arg("d_weights"), arg("threads") = 0);
}

}  // namespace fastrnn::bind
