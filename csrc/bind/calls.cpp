// `_C.Call` and the functions around it: a call of the engine from Python.
//
//   Call(…).forward(…)   any call: checks the arguments, then runs
//   backward(…)          its gradients; recorded_backward(…): those of a call that `layer` recorded
//   …_members(…)         the same for an ensemble
//   layer(…)             the whole usual call of a torch layer or cell: one call from Python
//                        instead of many
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "call.h"
#include "register.h"
#include "torch.h"

namespace fastrnn::bind {
namespace {

using Arg = py::handle;

Device device_of(py::handle device) {
  if (device.is_none()) return {};
  const auto [workspace, stream, allow_tf32, persistent] =
      device.cast<std::tuple<py::object, std::uintptr_t, bool, bool>>();
  return {workspace, stream, allow_tf32, persistent};
}

py::tuple as_tuple(Results&& r) {
  return py::make_tuple(std::move(r.output), std::move(r.h_n), std::move(r.c_n),
                        std::move(r.hidden), std::move(r.cell), std::move(r.saved));
}

Results saved_results(Arg hidden, Arg cell, Arg saved) {
  Results results;
  results.hidden = py::reinterpret_borrow<py::object>(hidden);
  results.cell = py::reinterpret_borrow<py::object>(cell);
  results.saved = py::reinterpret_borrow<py::object>(saved);
  return results;
}

std::unique_ptr<Call> make_call(const CheckedOptions& options, Arg input, Arg h0, Arg c0,
                                Arg weights, Arg batch_sizes, Arg lengths, Arg reset, Arg reset_hx,
                                int threads, bool cell, Frozen* frozen) {
  auto call = std::make_unique<Call>(options, threads, cell);
  const List list(weights, "weights");
  const py::handle each = list.items();
  call->set_inputs({input, h0, c0, each, batch_sizes, lengths, reset, reset_hx});
  if (frozen != nullptr) call->set_frozen(each, *frozen);
  call->hold(py::make_tuple(input, h0, c0, each, lengths, reset, reset_hx));
  return call;
}

py::list backward(const CheckedOptions& options, Arg input, Arg h0, Arg c0, Arg weights,
                  Arg batch_sizes, Arg lengths, Arg reset, Arg hidden, Arg cell_state, Arg saved,
                  Arg d_output, Arg d_hidden, Arg d_cell, Arg d_h_n, Arg d_c_n,
                  const py::tuple& needs, bool consume_saved, int threads, bool cell, Arg device) {
  Call call(options, threads, cell);
  call.set_inputs({input, h0, c0, weights, batch_sizes, lengths, reset, py::none()});
  return call.backward(saved_results(hidden, cell_state, saved),
                       {d_output, d_hidden, d_cell, d_h_n, d_c_n}, needs, consume_saved,
                       device_of(device));
}

// The gradients of a cell's weights, from the rows of any number of its steps. `saved`: as
// backward(consume_saved=True) left it.
py::list parameter_gradients(const CheckedOptions& options, Arg input, Arg h0, Arg weights,
                             Arg saved, const py::tuple& needs, int threads) {
  Call call(options, threads, true);
  const py::handle none(Py_None);
  call.set_inputs({input, h0, none, weights, none, none, none, none});
  return call.parameter_gradients(saved, needs);
}

// ---- ensembles ----------------------------------------------------------------------------------

class Ensemble {
 public:
  Ensemble(const CheckedOptions& options, std::int64_t count, int threads, const Inputs& inputs)
      : members_{count, {}, {}} {
    if (count < 1)
      throw py::value_error("members: expected 1 or more, got " + std::to_string(count));
    for (std::int64_t index = 0; index < count; ++index) {
      owned_.push_back(std::make_unique<Call>(options, threads, false, &members_, index));
      calls_.push_back(&owned_.back()->set_inputs(inputs));
    }
  }
  const std::vector<Call*>& calls() const { return calls_; }

 private:
  Members members_;
  std::vector<std::unique_ptr<Call>> owned_;
  std::vector<Call*> calls_;
};

py::tuple forward_members(const CheckedOptions& options, std::int64_t members, Arg input, Arg h0,
                          Arg c0, Arg weights, Arg batch_sizes, Arg lengths, Arg reset,
                          Arg reset_hx, bool states, bool save, int threads, bool zeros) {
  const Ensemble ensemble(options, members, threads,
                          {input, h0, c0, weights, batch_sizes, lengths, reset, reset_hx});
  return as_tuple(Call::forward_members(ensemble.calls(), states, save, zeros));
}

py::list backward_members(const CheckedOptions& options, std::int64_t members, Arg input, Arg h0,
                          Arg c0, Arg weights, Arg batch_sizes, Arg lengths, Arg reset, Arg hidden,
                          Arg cell, Arg saved, Arg d_output, Arg d_hidden, Arg d_cell, Arg d_h_n,
                          Arg d_c_n, const py::tuple& needs, int threads) {
  const Ensemble ensemble(options, members, threads,
                          {input, h0, c0, weights, batch_sizes, lengths, reset, py::none()});
  return Call::backward_members(ensemble.calls(), saved_results(hidden, cell, saved),
                                {d_output, d_hidden, d_cell, d_h_n, d_c_n}, needs);
}

// ---- the call of a torch layer or cell ----------------------------------------------------------

// The arguments of a call in the usual form. Python handles any other form, or raises the error.
class Usual {
 public:
  // False where a tensor is not plain.
  bool take(const py::dict& parameters, const py::tuple& names, py::handle input, py::handle hx,
            int states) {
    recording_ = grad_enabled();
    if (!take_tensor(input)) return false;
    weights = py::tuple(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
      // Null where it is no registered parameter: parametrized, under weight norm, in a replica.
      PyObject* weight =
          PyDict_GetItemWithError(parameters.ptr(), PyTuple_GET_ITEM(names.ptr(), i));
      if (weight == nullptr || !take_tensor(weight)) return false;
      weights[i] = py::handle(weight);
      needs.push_back(recording_ && requires_grad(weight));
    }
    h0 = c0 = py::handle(Py_None);
    if (hx.is_none()) return true;
    h0 = hx;
    if (states == 1) return take_tensor(h0);
    if (!PyTuple_CheckExact(hx.ptr()) || PyTuple_GET_SIZE(hx.ptr()) != states) return false;
    h0 = PyTuple_GET_ITEM(hx.ptr(), 0);
    c0 = PyTuple_GET_ITEM(hx.ptr(), 1);
    return take_tensor(h0) && take_tensor(c0);
  }
  bool records() const { return records_; }

  py::handle h0, c0;
  py::tuple weights;
  std::vector<bool> needs;  // which weights have a gradient; none where nothing is recorded

 private:
  bool take_tensor(py::handle tensor) {
    if (!is_plain_tensor(tensor) || negation_pending(tensor)) return false;
    records_ = records_ || (recording_ && requires_grad(tensor));
    return true;
  }

  bool recording_ = false, records_ = false;
};

// Whether a step with these weights is part of the loop (calls/autograd.py) that a node goes on
// with. A loop is a tuple: steps, own, token, weights, needs.
bool goes_on(py::handle loop, py::handle own, const Usual& usual) {
  if (!PyTuple_Check(loop.ptr()) || PyTuple_GET_ITEM(loop.ptr(), 1) != own.ptr()) return false;
  PyObject* weights = PyTuple_GET_ITEM(loop.ptr(), 3);
  PyObject* needs = PyTuple_GET_ITEM(loop.ptr(), 4);
  for (std::size_t i = 0; i < usual.weights.size(); ++i) {
    const auto at = static_cast<Py_ssize_t>(i);
    if (PyTuple_GET_ITEM(weights, at) != usual.weights[i].ptr()) return false;
    if ((PyTuple_GET_ITEM(needs, at) == Py_True) != usual.needs[i]) return false;
  }
  return true;
}

// The results with a gradient: (output, h_n, c_n, …) of the autograd Function. The weights of a
// step of a cell whose state is a recorded step's are a loop's, or `continued` begins one.
py::object recorded(py::handle own, Call& call, py::handle input, const Usual& usual) {
  static PyObject* const grad_fn = PyUnicode_InternFromString("grad_fn");
  static PyObject* const next_loop = PyUnicode_InternFromString("next_loop");
  const Recording& recording = torch_recording();
  PyObject* function = recording.apply;
  py::object node, loop = py::none();
  std::vector<PyObject*> arguments;
  if (call.cell() && !usual.h0.is_none()) {
    node = usual.h0.attr(py::handle(grad_fn));
    if (Py_TYPE(node.ptr()) == recording.node) {
      loop = node.attr(py::handle(next_loop));
      if (!goes_on(loop, own, usual)) {
        loop = py::none();
        function = recording.continued;
        arguments.push_back(node.ptr());
      }
    }
  }
  const py::handle none(Py_None), states(Py_False);
  // One argument: autograd looks at each that is no tensor, and at no item of a tuple.
  const py::tuple recorded =
      py::make_tuple(own, as_tuple(call.forward(false, true, false, {})), none, states, loop);
  for (const py::handle each : {py::handle(recorded), input, usual.h0, usual.c0, none, none})
    arguments.push_back(each.ptr());
  if (loop.is_none())
    for (const py::handle weight : usual.weights) arguments.push_back(weight.ptr());
  else
    arguments.push_back(PyTuple_GET_ITEM(loop.ptr(), 2));
  PyObject* outputs = PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr);
  if (outputs == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(outputs);
}

// Entries of autograd's lists before the tensors of a call, and before its weights
// (calls/autograd.py).
constexpr std::size_t kBeforeTensors = 1, kBeforeWeights = kBeforeTensors + 5;

// The gradients of a call that `recorded` recorded, in the order of `apply`'s arguments; None:
// Python has to find them. In a loop, which has one argument in place of the weights, those of the
// weights are not computed.
//   tensors: hidden, cell, saved, input, h0, c0 and the weights
py::object recorded_backward(const CheckedOptions& options, const py::tuple& tensors,
                             const py::tuple& cotangents, const py::tuple& needs, bool loop,
                             bool cell) {
  if (grad_enabled() || !no_observer() || !no_transform()) return py::none();
  for (const py::handle each : cotangents)
    if (!each.is_none() && (!is_plain_tensor(each) || negation_pending(each))) return py::none();
  const std::size_t count = tensors.size() - 6;
  py::tuple weights(count), own(3 + count);
  for (std::size_t i = 0; i < 3; ++i) own[i] = needs[kBeforeTensors + i];
  for (std::size_t i = 0; i < count; ++i) {
    weights[i] = tensors[6 + i];
    own[3 + i] = loop ? py::object(py::bool_(false)) : py::object(needs[kBeforeWeights + i]);
  }
  const py::handle none(Py_None);
  Call call(options, torch_threads(), cell);
  call.set_inputs({tensors[3], tensors[4], tensors[5], weights, none, none, none, none});
  if (!call.on_host()) return py::none();
  py::list found;
  try {
    found = call.backward(
        saved_results(tensors[0], tensors[1], tensors[2]),
        {cotangents[0], cotangents[1], cotangents[2], cotangents[3], cotangents[4]}, own, true, {});
  } catch (const py::type_error&) {  // a gradient that vmap has wrapped
    return py::none();
  } catch (const py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return py::none();
  }
  py::tuple all(needs.size());
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = none;
  for (std::size_t i = 0; i < 3; ++i) all[kBeforeTensors + i] = found[i];
  for (std::size_t i = 0; i < count && !loop; ++i) all[kBeforeWeights + i] = found[3 + i];
  return all;
}

// (output, hx_n, None) of a layer, hx_n of a cell, as tuples; None: Python has to handle the call.
py::object layer(py::handle own, const CheckedOptions& options, Frozen* frozen,
                 const py::dict& parameters, const py::tuple& names, py::handle input,
                 py::handle hx, bool batch_first, bool cell) {
  if (!no_observer() || !no_transform()) return py::none();
  Usual usual;
  std::unique_ptr<Call> call;
  py::object x = py::reinterpret_borrow<py::object>(input);
  try {
    if (!usual.take(parameters, names, input, hx, options.traits.states)) return py::none();
    if (batch_first) x = transposed(input);
    call = std::make_unique<Call>(options, torch_threads(), cell);
    const py::handle none(Py_None);
    call->set_inputs({x, usual.h0, usual.c0, usual.weights, none, none, none, none});
    if (!call->on_host() || (options.options.int8 && usual.records())) return py::none();
  } catch (const py::builtin_exception&) {
    return py::none();
  } catch (const py::error_already_set& error) {  // torch shows no memory: meta, sparse
    if (!error.matches(PyExc_TypeError) && !error.matches(PyExc_IndexError)) throw;
    return py::none();
  }
  py::tuple results;
  if (usual.records()) {
    if (frozen != nullptr) frozen->thaw();
    results = recorded(own, *call, x, usual);
  } else {
    if (frozen != nullptr) call->set_frozen(usual.weights, *frozen);
    results = as_tuple(call->forward(false, false, false, {}));
  }
  const bool two = options.traits.states > 1;
  py::tuple hx_n(two ? 2 : 1);
  for (std::size_t i = 0; i < hx_n.size(); ++i) hx_n[i] = results[i + 1];
  if (cell) return hx_n;
  const py::object output = results[0];
  return py::make_tuple(batch_first ? transposed(output) : output, hx_n, py::none());
}

}  // namespace

// Every argument may be given by position: naming one costs the dispatcher more than all the
// checks.
void register_calls(py::module_& module) {
  using py::arg;
  py::class_<Call>(module, "Call")
      .def(py::init(&make_call), arg("options"), arg("input"), arg("h0"), arg("c0"), arg("weights"),
           arg("batch_sizes") = py::none(), arg("lengths") = py::none(), arg("reset") = py::none(),
           arg("reset_hx") = py::none(), arg("threads") = 0, arg("cell") = false,
           arg("frozen") = py::none())
      .def(
          "forward",
          [](Call& self, bool states, bool save, bool zeros, Arg device) {
            return as_tuple(self.forward(states, save, zeros, device_of(device)));
          },
          arg("states") = false, arg("save") = false, arg("zeros") = false,
          arg("device") = py::none());
  module.def("backward", backward, arg("options"), arg("input"), arg("h0"), arg("c0"),
             arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"), arg("hidden"),
             arg("cell_state"), arg("saved"), arg("d_output"), arg("d_hidden"), arg("d_cell"),
             arg("d_h_n"), arg("d_c_n"), arg("needs"), arg("consume_saved") = false,
             arg("threads") = 0, arg("cell") = false, arg("device") = py::none());
  module.def("recorded_backward", recorded_backward);
  module.def("parameter_gradients", parameter_gradients, arg("options"), arg("input"), arg("h0"),
             arg("weights"), arg("saved"), arg("needs"), arg("threads") = 0);
  module.def("forward_members", forward_members, arg("options"), arg("members"), arg("input"),
             arg("h0"), arg("c0"), arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"),
             arg("reset_hx"), arg("states"), arg("save"), arg("threads") = 0, arg("zeros") = false);
  module.def("backward_members", backward_members, arg("options"), arg("members"), arg("input"),
             arg("h0"), arg("c0"), arg("weights"), arg("batch_sizes"), arg("lengths"), arg("reset"),
             arg("hidden"), arg("cell_state"), arg("saved"), arg("d_output"), arg("d_hidden"),
             arg("d_cell"), arg("d_h_n"), arg("d_c_n"), arg("needs"), arg("threads") = 0);
  module.def("layer", layer);
  module.def("fill_new_arrays", fill_new_arrays, arg("byte"));
}

}  // namespace fastrnn::bind
