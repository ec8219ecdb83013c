// The results and gradients of a call: allocated, described in its Problem, and computed.

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "dtype.h"
#include "gil.h"
#include "sequences.h"
#include "torch.h"

namespace fastrnn::bind {
namespace {

int first_byte = -1;  // every byte of a new array; -1: as allocated

}  // namespace

int fill_new_arrays(int byte) { return std::exchange(first_byte, byte); }

// ---- new arrays ---------------------------------------------------------------------------------

// For members the array has a leading axis, and each writes to its part.
Call::Made Call::make(const Shape& shape, dlpack::DataType dtype, bool zeros) {
  Shape whole = shape;
  if (members_ != nullptr) {
    whole = {members_->count};
    for (const std::int64_t size : shape) whole.sizes[whole.ndim++] = size;
  }
  Made made;
  made.object = new_array(like_, on_host(), whole, dtype, zeros);
  Owners none;  // the object itself keeps its memory
  made.data = static_cast<char*>(Array(made.object, {"output"}, none).data());
  made.bytes = dtype.bits / 8;
  for (const std::int64_t size : shape) made.bytes *= static_cast<std::size_t>(size);
  if (on_host()) ask_for_large_pages(made.data, made.bytes * (members_ ? members_->count : 1));
  if (first_byte >= 0 && !zeros && on_host())
    std::memset(made.data, first_byte, made.bytes * (members_ ? members_->count : 1));
  return made;
}

void* Call::part(const Made& made) const {
  return made.data == nullptr ? nullptr : made.data + static_cast<std::size_t>(index_) * made.bytes;
}

Shape Call::sequence_shape(std::int64_t layers, std::int64_t units) const {
  Shape shape;
  if (layers > 0) shape.sizes[shape.ndim++] = layers;
  if (!packed()) shape.sizes[shape.ndim++] = problem_.T;
  shape.sizes[shape.ndim++] = packed() ? N_ : problem_.B;
  shape.sizes[shape.ndim++] = units;
  return shape;
}

Results Call::allocate(const std::vector<Call*>& calls, bool states, bool save, bool zeros) {
  Call& first = *calls[0];
  const Problem& p = first.problem_;
  const std::int64_t H = p.H, out = first.output_size();
  const bool every = states || save, two = first.traits_.states > 1;
  const bool one_h = first.cell_ && !states;  // of a cell: h_n, which backward does not read
  const std::int64_t planes = first.traits_.saved_planes * padded(H);
  Made output, hidden, h_n, c_n, cell, saved;
  h_n = first.make(first.state_shape(out), first.storage_);
  if (two) c_n = first.make(first.state_shape(H), first.storage_);
  if (!first.cell_) output = first.make(first.sequence_shape(0, first.D_ * out), first.storage_);
  if (every && !one_h)
    hidden = first.make(first.sequence_shape(first.L_, first.D_ * out), first.storage_);
  if (every && two) cell = first.make(first.sequence_shape(first.L_, first.D_ * H), first.compute_);
  if (save && !p.options.recompute) {
    const bool incomplete = H % kUnitPadding != 0 || p.lengths;
    saved = first.make({first.groups(), first.N_, planes}, first.compute_, zeros && incomplete);
  }
  for (Call* call : calls) {
    Problem& problem = call->problem_;
    problem.all_layers = every;
    problem.h_n = call->part(h_n);
    problem.c_n = call->part(c_n);
    problem.hidden = call->part(hidden);
    problem.cell = call->part(cell);
    problem.saved = planes > 0 ? call->part(saved) : nullptr;
    problem.output = every && call->on_host() ? call->part(output) : nullptr;
    if (one_h)
      problem.hidden = problem.h_n;
    else if (!every)
      problem.hidden = call->part(output);
  }
  const auto object = [](Made& made) { return made.object ? std::move(made.object) : py::none(); };
  return {object(output), object(h_n), object(c_n), object(hidden), object(cell), object(saved)};
}

// ---- what backward reads ------------------------------------------------------------------------

void* Call::read(py::handle object, const char* name, dlpack::DataType dtype, const Shape& shape) {
  const Array a = array(object, {name});
  return a.expect_shape(shape).expect_dtype(dtype).expect_contiguous().data();
}

void Call::set_saved(const Results& saved, bool consume) {
  const std::int64_t H = problem_.H;
  problem_.all_layers = true;
  if (!cell_ || !saved.hidden.is_none())
    problem_.hidden =
        read(saved.hidden, "hidden", storage_, sequence_shape(L_, D_ * output_size()));
  if (traits_.states < 2)
    expect_absent(saved.cell, "cell");
  else
    problem_.cell = read(saved.cell, "cell", compute_, sequence_shape(L_, D_ * H));
  if (!problem_.options.recompute) set_gates(saved.saved, consume);
}

void Call::set_gates(py::handle saved, bool consume) {
  const std::int64_t planes = traits_.saved_planes * padded(problem_.H);
  const Array a = array(saved, {"saved"});
  a.expect_shape({groups(), N_, planes}).expect_dtype(compute_).expect_contiguous();
  if (consume) a.expect_writable();
  problem_.consume_saved = consume;
  if (planes > 0) problem_.saved = a.data();
}

Sequence Call::layers_gradient(py::handle object, const char* name, dlpack::DataType dtype,
                               std::int64_t units, std::int64_t& layer_stride) {
  if (object.is_none()) return {};
  const Array a = array(object, {name});
  a.expect_shape(sequence_shape(L_, units)).expect_dtype(dtype);
  layer_stride = a.stride(0);
  return sequence_of(a, 1);
}

void Call::set_cotangents(const Cotangents& d) {
  const std::int64_t out = output_size();
  if (!d.output.is_none()) {
    const Array a = array(d.output, {"d_output"});
    a.expect_shape(sequence_shape(0, D_ * out)).expect_dtype(storage_);
    problem_.d_output = sequence_of(a, 0);
  }
  problem_.d_hidden =
      layers_gradient(d.hidden, "d_hidden", storage_, D_ * out, problem_.d_hidden_layer);
  problem_.d_h_n = state(d.h_n, "d_h_n", out);
  if (traits_.states < 2) {
    expect_absent(d.cell, "d_cell");
    expect_absent(d.c_n, "d_c_n");
    return;
  }
  problem_.d_cell =
      layers_gradient(d.cell, "d_cell", compute_, D_ * problem_.H, problem_.d_cell_layer);
  problem_.d_c_n = state(d.c_n, "d_c_n", problem_.H);
}

// ---- gradients ----------------------------------------------------------------------------------

py::list Call::allocate_gradients(const std::vector<Call*>& calls, const py::tuple& needs) {
  Call& first = *calls[0];
  const Problem& p = first.problem_;
  const auto weights = static_cast<std::int64_t>(first.weights_.size());
  constexpr std::int64_t kOthers = 3;  // input, h0, c0
  const std::int64_t count = kOthers + weights;
  if (static_cast<std::int64_t>(needs.size()) != count)
    throw py::value_error("needs: expected " + std::to_string(count) + " values, got " +
                          std::to_string(needs.size()));
  const std::int64_t out = first.output_size();
  const Shape shapes[] = {first.cell_ ? Shape{p.B, p.I} : first.sequence_shape(0, p.I),
                          first.state_shape(out), first.state_shape(p.H)};
  const bool exists[] = {true, true, first.traits_.states > 1};
  py::list objects(static_cast<std::size_t>(count));
  std::vector<Made> made(static_cast<std::size_t>(count));
  bool any_weight = false;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    const bool wanted = PyTuple_GET_ITEM(needs.ptr(), i) == Py_True && (i >= kOthers || exists[i]);
    if (wanted)
      made[at] = first.make(
          i < kOthers ? shapes[i] : first.weights_[static_cast<std::size_t>(i - kOthers)].shape(),
          first.storage_);
    any_weight = any_weight || (wanted && i >= kOthers);
    objects[at] = wanted ? made[at].object : py::none();
  }
  for (Call* call : calls) {
    Problem& problem = call->problem_;
    problem.d_input = call->part(made[0]);
    problem.d_h0 = call->part(made[1]);
    problem.d_c0 = call->part(made[2]);
    if (!any_weight) continue;
    for (std::int64_t group = 0; group < first.groups(); ++group)
      call->d_parameters_.push_back(call->gradients_of(
          made.data() + kOthers + group * call->per_group_, call->parameters_[group]));
    problem.d_parameters = call->d_parameters_.data();
  }
  return objects;
}

// Where one group's gradients are written, in the order of the flat list.
Parameters Call::gradients_of(const Made* made, const Parameters& of) const {
  Parameters gradients;
  for (Weight Parameters::* const member :
       {&Parameters::weight_ih, &Parameters::weight_hh, &Parameters::bias_ih, &Parameters::bias_hh,
        &Parameters::weight_hr})
    if ((of.*member).data != nullptr) (gradients.*member).data = part(*made++);
  return gradients;
}

// ---- a run --------------------------------------------------------------------------------------

void Call::check_device() const {
  const Problem& p = problem_;
  if (on_host() && p.options.maths.heads > 1)
    throw py::value_error("heads: expected 1 in host memory, where programs run more, got " +
                          std::to_string(p.options.maths.heads));
  if (!on_host() && (p.options.recompute || p.reset_h.data || p.reset_c.data))
    throw py::value_error(
        "options: expected neither recompute nor reset_hx, which the CUDA kernels do not support");
}

void Call::check_gradient() const {
  if (problem_.options.int8) throw py::value_error("options: int8 has no gradient");
}

const Backend& Call::backend() const {
  if (on_host()) return cpu_backend();
#ifdef FASTRNN_HAS_CUDA
  return cuda_backend();
#else
  input_->complain("host memory: this build has no kernels for CUDA",
                   "an array on cuda:" + std::to_string(input_->cuda_device()));
#endif
}

void Call::run(Pass pass, const Device& device) {
  const Backend& kernels = backend();
  problem_.stream = reinterpret_cast<void*>(device.stream);
  problem_.allow_tf32 = device.allow_tf32;
  problem_.persistent = device.persistent;
  const std::size_t bytes = kernels.workspace_size(problem_, pass);
  py::object given = py::none();
  if (!on_host()) {
    given = device.workspace(bytes);
    const Array a = array(given, {"workspace"});
    constexpr std::uintptr_t kAlignment = 256;  // what CUDA's libraries expect
    if (a.bytes() < bytes || reinterpret_cast<std::uintptr_t>(a.data()) % kAlignment != 0)
      a.complain(std::to_string(bytes) + " bytes, 256-byte aligned",
                 std::to_string(a.bytes()) + " bytes");
    problem_.workspace = a.data();
  }
  const WithoutGil no_gil;
  const Scratch scratch(on_host() ? bytes : 0);
  if (on_host()) problem_.workspace = scratch.data();
  (pass == Pass::forward ? kernels.forward : kernels.backward)(problem_);
}

Results Call::forward(bool states, bool save, bool zeros, const Device& device) {
  check_device();
  if (save) check_gradient();
  Results results = allocate({this}, states, save, zeros);
  run(Pass::forward, device);
  if (!on_host() && (states || save)) results.output.attr("copy_")(results.hidden[py::int_(-1)]);
  return results;
}

py::list Call::backward(const Results& saved, const Cotangents& cotangents, const py::tuple& needs,
                        bool consume_saved, const Device& device) {
  check_device();
  check_gradient();
  set_saved(saved, consume_saved);
  set_cotangents(cotangents);
  py::list gradients = allocate_gradients({this}, needs);
  run(Pass::backward, device);
  return gradients;
}

py::list Call::parameter_gradients(py::handle saved, const py::tuple& needs) {
  if (!on_host() || problem_.options.recompute || traits_.saved_planes == 0)
    throw py::value_error("options: expected a call in host memory that saves its gates");
  set_gates(saved, true);
  problem_.all_layers = problem_.parameters_alone = true;
  py::list gradients = allocate_gradients({this}, needs);
  run(Pass::backward, {});
  return gradients;
}

// ---- ensembles ----------------------------------------------------------------------------------

// Whether the parameters have the same addresses. In an ensemble each has one stride between
// members, so comparing two members is enough.
bool Call::same_weights(const Call& a, const Call& b) {
  for (std::size_t i = 0; i < a.weights_.size(); ++i)
    if (a.weights_[i].data() != b.weights_[i].data()) return false;
  return true;
}

void Call::run_together(const std::vector<Call*>& calls, Pass pass) {
  std::vector<Problem> problems;
  problems.reserve(calls.size());
  for (const Call* call : calls) problems.push_back(call->problem_);
  const auto count = static_cast<std::int64_t>(calls.size());
  const bool pack = pass == Pass::forward && count > 1 && same_weights(*calls[0], *calls[1]);
  const Backend& backend = cpu_backend();
  const WithoutGil no_gil;
  const Memory packed(pack ? backend.packed_size(problems[0]) : 0);
  if (pack) backend.pack(problems[0], packed.data());
  for (Problem& problem : problems) problem.packed = pack ? packed.data() : nullptr;
  const Scratch scratch(backend.ensemble_workspace_size(problems.data(), count, pass));
  problems[0].workspace = scratch.data();
  backend.run_ensemble(problems.data(), count, pass);
}

Results Call::forward_members(const std::vector<Call*>& calls, bool states, bool save, bool zeros) {
  Results results = allocate(calls, states, save, zeros);
  run_together(calls, Pass::forward);
  return results;
}

py::list Call::backward_members(const std::vector<Call*>& calls, const Results& saved,
                                const Cotangents& cotangents, const py::tuple& needs) {
  for (Call* call : calls) {
    call->set_saved(saved, false);
    call->set_cotangents(cotangents);
  }
  py::list gradients = allocate_gradients(calls, needs);
  run_together(calls, Pass::backward);
  return gradients;
}

}  // namespace fastrnn::bind
