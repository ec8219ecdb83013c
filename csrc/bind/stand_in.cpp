// The stand-ins of a traced step (python/fastrnn/program/trace.py): what torch calls for each use.
//
// Every call of scan runs the step on stand-ins, to check that it still does what its program was
// made from: each torch function call is compared with the one recorded at its position. In C++
// because this is most of the cost of a small call.
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "register.h"

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

// One argument of a recorded call: a stand-in, which must be the same object; a captured tensor, by
// its slot; or a number, a string or None, which must be equal and of the same type.
enum class Kind { stand_in, captured, plain };

struct Argument {
  Kind kind;
  py::object value;  // of a captured tensor null
  long slot = -1;
};

struct RecordedCall {
  py::object function;
  py::object recorded;  // the call itself, for comparisons in Python
  py::object outputs;   // null: the call is not part of a program
  bool grad;            // whether gradients were on
  bool simple;          // every argument is an Argument, and there are no keywords
  std::vector<Argument> arguments;
};

// The calls of a recording, in their order.
class RecordedCalls {
 public:
  explicit RecordedCalls(const py::list& recorded) {
    for (const py::handle call : recorded) {
      const py::object simple = call.attr("simple"), outputs = call.attr("outputs");
      RecordedCall made{call.attr("func"),
                        py::reinterpret_borrow<py::object>(call),
                        {},
                        py::cast<bool>(call.attr("grad")),
                        !simple.is_none(),
                        {}};
      if (!outputs.is_none()) made.outputs = outputs;
      if (made.simple)
        for (const py::handle item : simple) made.arguments.push_back(argument(item));
      calls_.push_back(std::move(made));
    }
  }
  std::size_t size() const { return calls_.size(); }
  const RecordedCall& operator[](std::size_t i) const { return calls_[i]; }

 private:
  static Argument argument(py::handle item) {
    const auto pair = py::cast<py::tuple>(item);
    const auto kind = static_cast<Kind>(py::cast<int>(pair[0]));
    if (kind == Kind::captured) return {kind, {}, py::cast<long>(pair[1])};
    return {kind, pair[1], -1};
  }

  std::vector<RecordedCall> calls_;
};

// Python functions, set once.
struct Python {
  PyObject* other = nullptr;            // handles every other torch function of a stand-in
  PyObject* is_grad_enabled = nullptr;  // torch's
};
Python python;

// The comparison that runs in this thread.
struct Replay {
  const RecordedCalls* calls;
  PyObject* session;  // its part in Python
  std::size_t at = 0;
  std::vector<std::pair<PyObject*, long>> slots;  // of captured tensors, which the session holds
};
thread_local Replay* replay = nullptr;

// The step does something else: the session raises.
bool changed() {
  static PyObject* const name = PyUnicode_InternFromString("changed");
  Py_XDECREF(PyObject_CallMethodNoArgs(replay->session, name));
  return false;
}

// The slot of a captured tensor; -1 with an exception.
long slot_of(PyObject* tensor) {
  for (const auto& [known, slot] : replay->slots)
    if (known == tensor) return slot;
  static PyObject* const name = PyUnicode_InternFromString("slot_of");
  PyObject* answer = PyObject_CallMethodOneArg(replay->session, name, tensor);
  if (answer == nullptr) return -1;
  const long slot = PyLong_AsLong(answer);
  Py_DECREF(answer);
  if (slot >= 0) replay->slots.emplace_back(tensor, slot);
  return slot;
}

bool same(const Argument& known, PyObject* given) {
  if (known.kind == Kind::stand_in) return given == known.value.ptr() || changed();
  if (known.kind == Kind::captured) {
    const long slot = slot_of(given);
    return slot == known.slot || (!PyErr_Occurred() && changed());
  }
  if (Py_TYPE(given) != Py_TYPE(known.value.ptr())) return changed();
  const int equal = PyObject_RichCompareBool(given, known.value.ptr(), Py_EQ);
  return equal == 1 || (equal == 0 && changed());
}

bool same_grad(const RecordedCall& call) {
  PyObject* on = PyObject_CallNoArgs(python.is_grad_enabled);
  if (on == nullptr) return false;
  Py_DECREF(on);
  return (on == Py_True) == call.grad || changed();
}

// The results of a call of the function that is expected here.
PyObject* matched(const RecordedCall& call, PyObject* args, PyObject* keywords) {
  const bool plain = keywords == nullptr || keywords == Py_None || PyDict_GET_SIZE(keywords) == 0;
  if (!call.simple || !plain || !PyTuple_Check(args) || !call.outputs) {
    static PyObject* const name = PyUnicode_InternFromString("matched");
    return PyObject_CallMethodObjArgs(replay->session, name, call.recorded.ptr(), args,
                                      plain ? Py_None : keywords, nullptr);
  }
  const auto count = static_cast<std::size_t>(PyTuple_GET_SIZE(args));
  if (count != call.arguments.size()) return changed(), nullptr;
  for (std::size_t i = 0; i < count; ++i)
    if (!same(call.arguments[i], PyTuple_GET_ITEM(args, i))) return nullptr;
  if (!same_grad(call)) return nullptr;
  return call.outputs.inc_ref().ptr();
}

// __torch_function__: (class, function, types, arguments, keywords).
PyObject* torch_function(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (replay != nullptr && count >= 4 && replay->at < replay->calls->size()) {
    const RecordedCall& call = (*replay->calls)[replay->at];
    const int expected = given[1] == call.function.ptr()
                             ? 1
                             : PyObject_RichCompareBool(given[1], call.function.ptr(), Py_EQ);
    if (expected < 0) return nullptr;
    if (expected == 1) {
      ++replay->at;
      return matched(call, given[3], count > 4 ? given[4] : nullptr);
    }
  }
  return PyObject_Vectorcall(python.other, given + 1, static_cast<std::size_t>(count - 1), nullptr);
}

PyMethodDef torch_function_definition = {
    "torch_function", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(torch_function)),
    METH_FASTCALL, "What torch calls for each use of a stand-in."};

// Runs `step`, comparing it with `calls`. Returns how many of them it made, and its results.
py::tuple run_replay(const RecordedCalls& calls, py::handle session, const py::function& step,
                     const py::args& arguments) {
  struct Scope {
    Replay mine;
    Replay* before;
    explicit Scope(const RecordedCalls& calls, py::handle session)
        : mine{&calls, session.ptr(), 0, {}}, before(replay) {
      replay = &mine;
    }
    ~Scope() { replay = before; }
  };
  const Scope scope(calls, session);
  const py::object results = step(*arguments);
  return py::make_tuple(scope.mine.at, results);
}

}  // namespace

void register_stand_in(py::module_& module) {
  py::class_<RecordedCalls>(module, "StandInCalls",
                            "The calls of a recorded step, to be compared with.")
      .def(py::init<const py::list&>(), py::arg("calls"))
      .def("replay", &run_replay, py::arg("session"), py::arg("step"),
           "(number of calls, results) of step(*arguments), each call compared.");
  module.def(
      "set_stand_ins",
      [](const py::object& other, const py::object& is_grad_enabled) {
        python = {other.inc_ref().ptr(), is_grad_enabled.inc_ref().ptr()};
        PyObject* function = PyCFunction_New(&torch_function_definition, nullptr);
        if (function == nullptr) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(function);
      },
      py::arg("other"), py::arg("is_grad_enabled"),
      "Stores the two functions; returns the __torch_function__ of the stand-ins.");
}

}  // namespace fastrnn::bind
