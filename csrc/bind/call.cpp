// The inputs of a call: checked, and described in its Problem.

#include "call.h"

#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/openmp.h"
#include "dtype.h"
#include "int8.h"
#include "sequences.h"

namespace fastrnn::bind {
namespace {

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

}  // namespace

int checked_threads(int threads) {
  if (threads < 0)
    throw py::value_error("threads: expected 0 (the default) or more, got " +
                          std::to_string(threads));
  return threads > 0 ? threads : openmp::max_threads();
}

List::List(py::handle object, const char* argument)
    : items_(py::reinterpret_steal<py::object>(PySequence_Tuple(object.ptr()))) {
  if (items_) return;
  PyErr_Clear();
  throw py::type_error(std::string(argument) + ": expected a list of arrays, got " +
                       Py_TYPE(object.ptr())->tp_name);
}

Call::Call(const CheckedOptions& checked, int threads, bool cell, Members* members,
           std::int64_t index)
    : traits_(checked.traits), cell_(cell), members_(members), index_(index) {
  problem_.options = checked.options;
  L_ = checked.options.layers;
  D_ = checked.options.directions;
  problem_.threads = checked_threads(threads);
}

Call& Call::set_inputs(const Inputs& inputs) {  // each sets sizes that the next one checks against
  set_input(inputs.input, inputs.batch_sizes);
  set_weights(inputs.weights);
  set_rows(inputs.lengths, inputs.reset);
  set_states(inputs.h0, inputs.c0);
  set_reset_states(inputs.reset_hx);
  return *this;
}

void Call::set_weights_for(py::handle input, py::handle weights) {
  set_input(input, py::none());
  set_weights(weights);
}

// On the device of the input, which is the first; of members in host memory.
Array Call::array(py::handle object, const Name& name) {
  if (members_ == nullptr) {
    Array a(object, name, owners_);
    if (input_) a.expect_with(*input_);
    return a;
  }
  if (index_ == 0) members_->arrays.emplace_back(object, name, members_->owners).expect_host();
  return members_->arrays.at(next_++).member(index_, members_->count);
}

std::int64_t Call::output_size() const {
  return problem_.options.proj_size > 0 ? problem_.options.proj_size : problem_.H;
}

// Copies `count` values, so that the engine reads the values that were checked, even if another
// thread writes to the array meanwhile.
const std::int64_t* Call::kept(const Array& a, std::int64_t count) {
  const auto* values = static_cast<const std::int64_t*>(a.data());
  row_counts_.assign(values, values + count);
  row_counts_.push_back(0);  // so that data() is not null, which means "not given"
  return row_counts_.data();
}

void Call::expect_absent(py::handle object, const char* name) const {
  if (!object.is_none())
    throw py::value_error(std::string(name) + ": expected None for the " + problem_.options.cell +
                          " cell, which has no c, got " + Py_TYPE(object.ptr())->tp_name);
}

void Call::set_batch_sizes(py::handle batch_sizes, std::int64_t rows) {
  const Array sizes(batch_sizes, {"batch_sizes"}, owners_);  // the same for every member
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
  like_ = input;
  const Array& x = input_.emplace(array(input, {"input"}));
  problem_.device = x.cuda_device();
  problem_.dtype = storage_of(x);
  storage_ = data_type(problem_.dtype);
  compute_ = data_type(problem_.dtype == DType::f64 ? DType::f64 : DType::f32);
  if (cell_) {
    x.expect_axes(2, "two axes (B, I)");
    problem_.T = 1;
    problem_.B = N_ = x.shape(0);
    problem_.I = x.shape(1);
    problem_.input = {x.data(), 0, x.stride(0), x.stride(1)};
    return;
  }
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

Parameters Call::parameters(const List& list, std::int64_t group) {
  const std::int64_t rows = traits_.gates * problem_.H, out = output_size();
  const std::int64_t layer = group / D_, in = layer == 0 ? problem_.I : D_ * out;
  std::int64_t index = group * per_group_;
  const auto next = [&](const char* parameter, const Shape& shape) -> Weight {
    const std::int64_t i = index++;
    const Array a = array(list[i], {"weights", i, parameter, layer, group % D_ == 1});
    weights_.push_back(a.expect_shape(shape).expect_dtype(storage_));
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
  held_weights_ = list.items();
  if (problem_.options.int8) return set_int8(list);
  const CellOptions& maths = problem_.options.maths;
  const std::int64_t groups = L_ * D_, least = problem_.options.proj_size > 0 ? 3 : 2;
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
  weights_.reserve(static_cast<std::size_t>(list.size()));
  for (std::int64_t group = 0; group < groups; ++group)
    parameters_.push_back(parameters(list, group));
  problem_.parameters = parameters_.data();
}

void Call::set_int8(const List& list) {
  if (members_ != nullptr || !on_host())
    throw py::value_error("weights: int8 runs in host memory, and in no ensemble");
  if (problem_.dtype != DType::f32)
    input_->complain("float32 for int8 weights", type_name(storage_));
  if (list.size() != 1)
    throw py::value_error("weights: expected one array of packed int8 weights, got " +
                          std::to_string(list.size()));
  const Array packed = array(list[0], {"weights", 0, "packed"});
  const Int8Header header = Int8Header::of(packed, problem_.options);
  if (header.input_size != problem_.I)
    input_->complain("rows of " + std::to_string(header.input_size) + " values",
                     std::to_string(problem_.I));
  problem_.H = header.hidden_size;
  weights_.push_back(packed);
  problem_.packed = Int8Header::weights(packed);
  if (reinterpret_cast<std::uintptr_t>(problem_.packed) % 64 == 0) return;
  const auto bytes = static_cast<std::size_t>(header.bytes);
  auto aligned = std::make_shared<Memory>(bytes);  // of a file mapped into memory, for example
  std::memcpy(aligned->data(), problem_.packed, bytes);
  problem_.packed = aligned->data();
  packed_ = std::move(aligned);
}

Call& Call::set_frozen(py::handle weights, Frozen& frozen) {
  if (!on_host()) return *this;
  const List list(weights, "weights");
  std::vector<py::object> objects;
  for (std::int64_t i = 0; i < list.size(); ++i)
    objects.push_back(py::reinterpret_borrow<py::object>(list[i]));
  packed_ = frozen.find(problem_, objects.data(), weights_);
  if (packed_) problem_.packed = packed_->data();
  return *this;
}

void Call::set_rows(py::handle lengths, py::handle reset) {
  if (!lengths.is_none()) {
    if (packed()) throw py::value_error("lengths: expected None with batch_sizes");
    const Array a = array(lengths, {"lengths"});
    a.expect_dtype({dlpack::kInt, 64, 1}).expect_shape({problem_.B}).expect_contiguous();
    problem_.lengths = on_host() ? kept(a, problem_.B) : static_cast<const std::int64_t*>(a.data());
    for (std::int64_t b = 0; on_host() && b < problem_.B; ++b)
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

Shape Call::state_shape(std::int64_t units) const {
  return cell_ ? Shape{problem_.B, units} : Shape{groups(), problem_.B, units};
}

State Call::state(py::handle object, const char* name, std::int64_t units) {
  if (object.is_none()) return {};
  const Array a = array(object, {name});
  a.expect_shape(state_shape(units)).expect_dtype(storage_);
  return cell_ ? State{a.data(), 0, a.stride(0), a.stride(1)} : state_of(a);
}

void Call::set_states(py::handle h0, py::handle c0) {
  problem_.h0 = state(h0, "h0", output_size());
  if (traits_.states < 2) return expect_absent(c0, "c0");
  problem_.c0 = state(c0, "c0", problem_.H);
}

State Call::reset_state(py::handle object, const char* name, std::int64_t units) {
  if (object.is_none()) return {};
  const Array a = array(object, {name});
  a.expect_shape({groups(), units}).expect_dtype(storage_);
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

}  // namespace fastrnn::bind
