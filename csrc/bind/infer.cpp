// Every check is one of _C.forward's; where one fails the answer is None, and the caller goes the
// way that says what is wrong.
#include "infer.h"

#include <pybind11/stl.h>

#include <initializer_list>
#include <memory>
#include <utility>
#include <vector>

#include "argument.h"
#include "backend.h"
#include "dtype.h"
#include "frozen.h"
#include "gil.h"
#include "memory.h"
#include "options.h"

namespace fastrnn::bind {
namespace {

struct Refused {};

void expect(bool fits) {
  if (!fits) throw Refused{};
}

PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

// What torch is asked before a call, and made of once by set_torch().
struct Torch {
  // Types whose memory is what it says: not subclasses, which may mean something else by a call.
  PyObject *tensor, *parameter;
  PyObject* get_num_threads;
  // Functions that give False, None or 0 and variables (a module's dictionary, a name) that are
  // False or negative, where nothing traces or profiles, and where nothing records, casts or
  // transforms.
  struct Questions {
    std::vector<PyObject*> functions;
    std::vector<std::pair<PyObject*, PyObject*>> variables;
  };
  Questions listening, changing;
};
Torch torch;

py::object called(PyObject* function) {
  PyObject* answer = PyObject_CallNoArgs(function);
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

bool all_quiet(const Torch::Questions& questions) {
  for (PyObject* function : questions.functions) {
    const py::object answer = called(function);
    if (!answer.is(py::handle(Py_False)) && !answer.is_none() &&
        !(PyLong_CheckExact(answer.ptr()) && PyLong_AsLong(answer.ptr()) == 0))
      return false;
  }
  for (const auto& [dictionary, name] : questions.variables) {
    PyObject* value = PyDict_GetItemWithError(dictionary, name);
    if (value == nullptr) return false;
    if (value != Py_False && !(PyLong_CheckExact(value) && PyLong_AsLong(value) < 0)) return false;
  }
  return true;
}

bool is_plain(py::handle object) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == torch.tensor || type == torch.parameter;
}

// The answer of a tensor's attribute or method without arguments.
bool holds(py::handle tensor, PyObject* name, bool method) {
  PyObject* answer =
      method ? PyObject_CallMethodNoArgs(tensor.ptr(), name) : PyObject_GetAttr(tensor.ptr(), name);
  if (answer == nullptr) throw py::error_already_set();
  Py_DECREF(answer);
  return answer == Py_True;
}

}  // namespace

bool negation_pending(py::handle tensor) {
  static PyObject* const is_neg = interned("is_neg");
  return holds(tensor, is_neg, true);
}

namespace {

// Whether calling the engine itself cannot be told from going through torch's dispatcher: the
// tensors (or None) are plain ones in this machine's memory or a GPU's, and nothing traces, fakes
// or profiles.
bool nothing_listens(const py::tuple& tensors) {
  static PyObject* const is_cpu = interned("is_cpu");
  static PyObject* const is_cuda = interned("is_cuda");
  if (!all_quiet(torch.listening)) return false;
  for (const py::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    if (!is_plain(tensor) || !(holds(tensor, is_cpu, false) || holds(tensor, is_cuda, false)) ||
        negation_pending(tensor))
      return false;
  }
  return true;
}

void expect_settled(py::handle object) { expect(is_plain(object) && !negation_pending(object)); }

bool has_shape(const Array& a, std::initializer_list<std::int64_t> shape) {
  if (a.ndim() != static_cast<std::int64_t>(shape.size())) return false;
  int axis = 0;
  for (const std::int64_t size : shape)
    if (a.shape(axis++) != size) return false;
  return true;
}

py::object new_empty(py::handle like, std::initializer_list<std::int64_t> shape) {
  static PyObject* const name = interned("new_empty");
  py::tuple sizes(shape.size());
  std::size_t i = 0;
  for (const std::int64_t size : shape) sizes[i++] = py::int_(size);
  PyObject* made = PyObject_CallMethodOneArg(like.ptr(), name, sizes.ptr());
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

class Inference {
 public:
  Inference(const CheckedOptions& checked, int threads) : traits_(checked.traits) {
    problem_.options = checked.options;
    problem_.threads = threads;
  }

  // (T, B, I); with batch_first (B, T, I); a cell's (B, I).
  void set_input(py::handle input, bool batch_first, bool cell) {
    expect_settled(input);
    const Array x = host_array(input, {"input"});
    expect(x.ndim() == (cell ? 2 : 3));
    dtype_ = x.dtype();
    expect(find_dtype(dtype_));
    const int row = cell || batch_first ? 0 : 1;
    problem_.T = cell ? 1 : x.shape(batch_first ? 1 : 0);
    problem_.B = x.shape(row);
    problem_.I = x.shape(cell ? 1 : 2);
    expect(problem_.T > 0);
    problem_.input = {x.data(), cell ? 0 : x.stride(batch_first ? 1 : 0), x.stride(row),
                      x.stride(cell ? 1 : 2)};
  }

  // Those of `names` in a module's dictionary of parameters.
  void set_weights(const py::dict& parameters, const py::tuple& names, Frozen* frozen) {
    const std::int64_t L = problem_.options.layers, D = problem_.options.directions;
    const std::int64_t P = problem_.options.proj_size, groups = L * D;
    const auto count = static_cast<std::int64_t>(names.size());
    const std::int64_t each = count / groups;
    expect(problem_.options.maths.heads == 1);
    expect(count % groups == 0 && (each == 2 + (P > 0) || each == 4 + (P > 0)));
    objects_.reserve(names.size());
    arrays_.reserve(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
      // Null where it is parametrized, under weight norm, in a replica: no registered parameter.
      PyObject* weight =
          PyDict_GetItemWithError(parameters.ptr(), PyTuple_GET_ITEM(names.ptr(), i));
      expect(weight != nullptr);
      expect_settled(weight);
      objects_.push_back(py::reinterpret_borrow<py::object>(weight));
      arrays_.push_back(host_array(weight, {"weights"}));
      expect(same(arrays_.back().dtype(), dtype_));
    }
    expect(arrays_[1].ndim() == 2);
    problem_.H = arrays_[1].shape(0) / traits_.gates;
    expect(problem_.H > 0);
    const std::int64_t rows = traits_.gates * problem_.H, O = output_size();
    for (std::int64_t g = 0; g < groups; ++g) {
      const Array* a = arrays_.data() + g * each;
      Parameters p;
      expect(has_shape(a[0], {rows, g < D ? problem_.I : D * O}) && has_shape(a[1], {rows, O}));
      p.weight_ih = {a[0].data(), a[0].stride(0), a[0].stride(1)};
      p.weight_hh = {a[1].data(), a[1].stride(0), a[1].stride(1)};
      if (each >= 4) {
        expect(has_shape(a[2], {rows}) && has_shape(a[3], {rows}));
        p.bias_ih = {a[2].data(), 0, a[2].stride(0)};
        p.bias_hh = {a[3].data(), 0, a[3].stride(0)};
      }
      if (P > 0) {
        const Array& w = a[each - 1];
        expect(has_shape(w, {P, problem_.H}));
        p.weight_hr = {w.data(), w.stride(0), w.stride(1)};
      }
      parameters_.push_back(p);
    }
    problem_.parameters = parameters_.data();
    if (frozen != nullptr) packed_ = frozen->find(problem_, objects_.data(), arrays_);
    if (packed_) problem_.packed = packed_->data();
  }

  void set_states(py::handle hx, bool cell) {
    if (hx.is_none()) return;
    expect(PyTuple_CheckExact(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == traits_.states);
    problem_.h0 = state(PyTuple_GET_ITEM(hx.ptr(), 0), output_size(), cell);
    if (traits_.states > 1) problem_.c0 = state(PyTuple_GET_ITEM(hx.ptr(), 1), problem_.H, cell);
  }

  py::object run(py::handle input, bool batch_first, bool cell) {
    const std::int64_t groups = problem_.options.layers * problem_.options.directions;
    const std::int64_t B = problem_.B, O = output_size();
    const bool two = traits_.states > 1;
    py::object output, c_n;
    py::object h_n = cell ? new_empty(input, {B, O}) : new_empty(input, {groups, B, O});
    problem_.h_n = problem_.hidden = data(h_n);  // of a cell the same, so let it lie there once
    if (two) {
      c_n = cell ? new_empty(input, {B, problem_.H}) : new_empty(input, {groups, B, problem_.H});
      problem_.c_n = data(c_n);
    }
    if (!cell) {
      output = new_empty(input, {problem_.T, B, problem_.options.directions * O});
      problem_.hidden = data(output);
    }
    const Backend& backend = cpu_backend();
    {
      const WithoutGil no_gil;
      const Scratch scratch(backend.workspace_size(problem_, Pass::forward));
      problem_.workspace = scratch.data();
      backend.forward(problem_);
    }
    if (batch_first) output = output.attr("transpose")(0, 1);
    if (cell && two) return py::make_tuple(h_n, c_n);
    if (cell) return py::make_tuple(h_n);
    if (two) return py::make_tuple(output, h_n, c_n);
    return py::make_tuple(output, h_n);
  }

 private:
  Array host_array(py::handle object, const Name& name) {
    Array a(object, name, owners_);
    expect(a.host());
    return a;
  }

  bool find_dtype(dlpack::DataType dtype) {
    for (const DType known : {DType::f32, DType::f64, DType::bf16, DType::f16})
      if (same(dtype, data_type(known))) {
        problem_.dtype = known;
        return true;
      }
    return false;
  }

  std::int64_t output_size() const {
    return problem_.options.proj_size > 0 ? problem_.options.proj_size : problem_.H;
  }

  State state(py::handle object, std::int64_t units, bool cell) {
    const std::int64_t groups = problem_.options.layers * problem_.options.directions;
    expect_settled(object);
    const Array a = host_array(object, {"hx"});
    expect(same(a.dtype(), dtype_));
    if (cell) {
      expect(has_shape(a, {problem_.B, units}));
      return {a.data(), 0, a.stride(0), a.stride(1)};
    }
    expect(has_shape(a, {groups, problem_.B, units}));
    return {a.data(), a.stride(0), a.stride(1), a.stride(2)};
  }

  void* data(py::handle made) { return Array(made, {"output"}, owners_).data(); }

  Problem problem_;
  CellTraits traits_;
  dlpack::DataType dtype_{};
  std::vector<py::object> objects_;  // held: another thread may put others in their place
  std::vector<Array> arrays_;
  std::vector<Parameters> parameters_;
  std::shared_ptr<const Memory> packed_;
  Owners owners_;
};

py::object infer(const CheckedOptions& options, Frozen* frozen, const py::dict& parameters,
                 const py::tuple& names, py::handle input, py::handle hx, bool batch_first,
                 bool cell) {
  if (!all_quiet(torch.listening) || !all_quiet(torch.changing)) return py::none();
  try {
    Inference call(options, PyLong_AsLong(called(torch.get_num_threads).ptr()));
    call.set_input(input, batch_first, cell);
    call.set_weights(parameters, names, frozen);
    call.set_states(hx, cell);
    return call.run(input, batch_first, cell);
  } catch (const Refused&) {
  } catch (const py::builtin_exception&) {        // memory that the engine cannot read
  } catch (const py::error_already_set& error) {  // or torch does not give: meta, sparse
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return py::none();
}

using Variable = std::pair<py::dict, py::str>;

Torch::Questions questions(const py::list& functions, const std::vector<Variable>& variables) {
  Torch::Questions all;
  for (const py::handle function : functions) all.functions.push_back(function.inc_ref().ptr());
  for (const Variable& v : variables)
    all.variables.emplace_back(v.first.inc_ref().ptr(), v.second.inc_ref().ptr());
  return all;
}

void set_torch(const py::type& tensor, const py::type& parameter, const py::object& get_num_threads,
               const py::list& listening, const std::vector<Variable>& listening_variables,
               const py::list& changing, const std::vector<Variable>& changing_variables) {
  torch = {tensor.inc_ref().ptr(), parameter.inc_ref().ptr(), get_num_threads.inc_ref().ptr(),
           questions(listening, listening_variables), questions(changing, changing_variables)};
}

}  // namespace

void register_infer(py::module_& module) {
  module.def("infer", infer);
  module.def("nothing_listens", nothing_listens);
  module.def("set_torch", set_torch);
}

}  // namespace fastrnn::bind
