#include "program_steps.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "argument.h"
#include "convert.h"
#include "dtype.h"

namespace fastrnn::bind {
namespace {

using Index = std::int64_t;

std::size_t bytes_of(const Program& program) { return program.text().dtype == DType::f64 ? 8 : 4; }

template <class T>
T* shifted(T* data, Index elements, std::size_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return data == nullptr ? nullptr
                         : static_cast<Byte*>(data) + elements * static_cast<Index>(bytes);
}

}  // namespace

ProgramSteps::ProgramSteps(py::handle programs, Index batch_size, dlpack::DataType storage)
    : rows_(batch_size), storage_(storage) {
  Owners owners;
  for (const py::handle item : programs) {
    const auto pair = py::cast<py::tuple>(item);
    Layer layer{pair[0], py::cast<const Program*>(pair[0]), {}, {}};
    const Program& program = *layer.program;
    for (const py::handle array : pair[1]) {
      const Array a(array, Name{"shared", static_cast<Index>(layers_.size())}, owners);
      a.expect_dtype(data_type(program.text().dtype)).expect_contiguous().expect_host();
      const std::size_t i = layer.shared.size();
      if (i < program.shared.size() &&
          a.size() <= std::max(program.shared[i].high, program.shared[i].contiguous - 1))
        a.complain("all that its program reads", std::to_string(a.size()) + " elements");
      layer.shared.push_back(a.data());
      layer.held.push_back(py::reinterpret_borrow<py::object>(array));
    }
    if (layer.shared.size() != program.shared.size() || program.sequences.size() != 2 ||
        !program.fixed.empty() || program.states.empty())
      throw py::value_error("programs: expected those of layers, each with its shared arrays");
    layers_.push_back(std::move(layer));
  }
  if (layers_.empty()) throw py::value_error("programs: expected one for each layer, got none");
  const std::size_t item = bytes_of(*layers_[0].program);
  const auto rows = static_cast<std::size_t>(rows_);
  x_ = Memory(rows * static_cast<std::size_t>(layers_[0].program->sequences[0]) * item);
  const std::size_t state = rows * static_cast<std::size_t>(layers_[0].program->states[0]) * item;
  for (Memory* memory : {&h_, &h_n_[0], &h_n_[1], &y_}) *memory = Memory(state);
}

ProgramCall ProgramSteps::call_of(const Layer& layer, int threads) const {
  ProgramCall call;
  call.program = layer.program;
  call.T = 1;
  call.B = rows_;
  call.threads = threads;
  call.shared = layer.shared.data();
  return call;
}

std::size_t ProgramSteps::workspace_size(int threads) {
  std::size_t most = 0;
  for (const Layer& layer : layers_)
    most = std::max(most, program_workspace_size(call_of(layer, threads)));
  return most;
}

// x as the first program reads it.
const void* ProgramSteps::wide_x(const ProgramStep& step, Index* row) {
  const Program& first = *layers_[0].program;
  const Index units = first.sequences[0];
  const dlpack::DataType compute = data_type(first.text().dtype);
  if (same(storage_, compute) && (step.x_unit == 1 || units == 1)) {
    *row = step.x_row;
    return step.x;
  }
  convert_rows(step.x, storage_, step.x_row, step.x_unit, x_.data(), compute, rows_, units);
  *row = units;
  return x_.data();
}

void ProgramSteps::run(const ProgramStep& step, int threads, void* workspace) {
  Index x_row = 0;
  const void* x = wide_x(step, &x_row);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    const Program& program = *layer.program;
    const std::size_t item = bytes_of(program), stored = storage_.bits / 8;
    const dlpack::DataType compute = data_type(program.text().dtype);
    const bool half = stored != item;
    const auto number = static_cast<Index>(l);
    const Index O = program.states[0], H = program.states.size() > 1 ? program.states[1] : 0;
    const void* const h = shifted(step.h, number * rows_ * O, stored);
    void* const h_n = shifted(step.h_n, number * rows_ * O, stored);
    if (half) convert_rows(h, storage_, O, 1, h_.data(), compute, rows_, O);
    void* const after = half ? h_n_[l % 2].data() : h_n;
    // A program writes h twice, as the state and as the output of a step.
    const bool last = l + 1 == layers_.size();
    void* const y = last && !half ? step.output : y_.data();
    const Sequence sequences[] = {{const_cast<void*>(x), 0, x_row, 1}, {y, 0, O, 1}};
    const State firsts[2] = {};
    const State inits[] = {
        {const_cast<void*>(half ? static_cast<const void*>(h_.data()) : h), 0, O, 1},
        {const_cast<void*>(shifted(step.c, number * rows_ * H, item)), 0, H, 1}};
    void* const finals[] = {after, shifted(step.c_n, number * rows_ * H, item)};
    ProgramCall call = call_of(layer, threads);
    call.sequences = sequences;
    call.firsts = firsts;
    call.inits = inits;
    call.finals = finals;
    call.workspace = workspace;
    run_program(call);
    if (half) convert_rows(after, compute, O, 1, h_n, storage_, rows_, O);
    if (half && last) std::memcpy(step.output, h_n, static_cast<std::size_t>(rows_ * O) * stored);
    x = after;
    x_row = O;
  }
}

}  // namespace fastrnn::bind
