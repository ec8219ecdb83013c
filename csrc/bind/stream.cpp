#include "stream.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "backend.h"
#include "call.h"
#include "cpu/openmp.h"
#include "dtype.h"
#include "gil.h"
#include "int8.h"
#include "register.h"
#include "torch.h"

namespace fastrnn::bind {
namespace {

Memory zeros(std::int64_t elements, std::size_t item) {
  Memory memory(static_cast<std::size_t>(elements) * item);
  std::memset(memory.data(), 0, memory.bytes());
  return memory;
}

// `count` elements of `item` bytes, `unit` apart.
void copy_row(char* to, const char* from, std::int64_t unit, std::int64_t count, std::size_t item) {
  if (unit == 1) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * item);
    return;
  }
  const auto step = unit * static_cast<std::int64_t>(item);
  for (std::int64_t i = 0; i < count; ++i, to += item, from += step) std::memcpy(to, from, item);
}

// Copies an array of three axes to contiguous memory.
void copy_state(void* memory, const Array& a, std::size_t item) {
  auto* to = static_cast<char*>(memory);
  const auto bytes = static_cast<std::int64_t>(item), units = a.shape(2);
  for (std::int64_t l = 0; l < a.shape(0); ++l)
    for (std::int64_t b = 0; b < a.shape(1); ++b, to += units * bytes)
      copy_row(to, static_cast<const char*>(a.data()) + (l * a.stride(0) + b * a.stride(1)) * bytes,
               a.stride(2), units, item);
}

bool already_packed(const CheckedOptions& options, py::handle weights) {
  return options.options.int8 && PySequence_Size(weights.ptr()) == 1;
}

std::int64_t columns_of_first(const CheckedOptions& options, py::handle weights) {
  const auto first = py::reinterpret_steal<py::object>(PySequence_GetItem(weights.ptr(), 0));
  if (!first) throw py::error_already_set();
  Owners owners;
  const Array a(first, {"weights", 0, "weight_ih"}, owners);
  if (already_packed(options, weights)) return Int8Header::of(a, options.options).input_size;
  return a.expect_axes(2, "two axes (G·H, I)").shape(1);
}

// Sets a flag while a step runs.
class Busy {
 public:
  explicit Busy(bool& flag) : flag_(flag) { flag_ = true; }
  ~Busy() { flag_ = false; }
  Busy(const Busy&) = delete;
  Busy& operator=(const Busy&) = delete;

 private:
  bool& flag_;
};

}  // namespace

Stream::Stream(const CheckedOptions& options, py::handle weights, std::int64_t batch_size,
               const std::string& dtype, py::object threads, py::object view, py::handle programs)
    : options_(options),
      storage_(type_named(dtype)),
      output_(Tensor::empty({0}, storage_)),
      threads_(std::move(threads)),
      view_(std::move(view)) {
  constexpr std::int64_t kMostRows = std::numeric_limits<std::int32_t>::max();
  if (batch_size < 1 || batch_size > kMostRows)
    throw py::value_error("batch_size: expected 1 to " + std::to_string(kMostRows) + ", got " +
                          std::to_string(batch_size));
  if (options.options.directions != 1)
    throw py::value_error("bidirectional: a stream cannot run backwards in time");
  problem_.B = batch_size;
  problem_.I = columns_of_first(options, weights);
  item_ = storage_.bits / 8;
  pack(weights, programs);

  const std::int64_t L = layers(), B = batch_size, O = output_size(), H = problem_.H;
  compute_ = data_type(problem_.dtype == DType::f64 ? DType::f64 : DType::f32);
  c_item_ = compute_.bits / 8;
  const char* format = find_type(storage_)->format;
  format_ = format != nullptr ? *format : '\0';
  output_ = Tensor::empty({B, O}, storage_);
  staged_ = zeros(B * problem_.I, item_);
  initial_h_ = zeros(L * O, item_);
  for (Memory& h : h_) h = zeros(L * B * O, item_);
  problem_.hidden = output_.data();
  problem_.h0 = {h_[0].data(), B * O, O, 1};
  problem_.h_n = h_[1].data();
  if (has_c()) {
    initial_c_ = zeros(L * H, c_item_);
    for (Memory& c : c_) c = zeros(L * B * H, c_item_);
    problem_.c0 = {c_[0].data(), B * H, H, 1};
    problem_.c_n = c_[1].data();
  }
  if (has_c() && half()) {
    narrow_c_ = zeros(L * B * H, item_);
    problem_.wide_c0 = true;
    problem_.c_n = narrow_c_.data();  // required by forward, never read
    problem_.cell = c_[1].data();
  }
  set_threads();
}

void Stream::pack(py::handle weights, py::handle programs) {
  expect_idle();
  if (!programs.is_none()) {
    ProgramSteps made(programs, problem_.B, storage_);
    expect_hidden_size(made.hidden_size());
    programs_ = std::move(made);
    if (problem_.H == 0) problem_.threads = 0;
    problem_.options = options_.options;
    problem_.dtype = programs_.dtype();
    problem_.H = programs_.hidden_size();
    return;
  }
  const py::object input = py::cast(Tensor::empty({1, 1, problem_.I}, storage_));
  CheckedOptions given = options_;
  given.options.int8 = already_packed(options_, weights);
  Call call(given, 0);
  call.set_weights_for(input, weights);
  Problem p = call.problem();
  expect_hidden_size(p.H);
  const bool int8 = p.options.int8 = options_.options.int8;
  if (int8) expect_int8_columns(p.I, p.H, p.options.layers, 1);
  const Backend& backend = cpu_backend();
  if (p.packed == nullptr && packed_.data() == nullptr) packed_ = Memory(backend.packed_size(p));
  if (problem_.H == 0) {
    problem_.options = p.options;
    problem_.dtype = p.dtype;
    problem_.T = 1;
    problem_.H = p.H;
    problem_.threads = 0;
    const std::int64_t O = output_size(), rows = options_.traits.gates * p.H;
    constexpr std::int64_t kLarge = 1 << 18;  // products: some ten microseconds
    large_ = problem_.B * rows * (p.I + O + (layers() - 1) * 2 * O) >= kLarge;
  }
  if (p.packed != nullptr) {
    given_ = py::reinterpret_steal<py::object>(PySequence_GetItem(weights.ptr(), 0));
    problem_.packed = p.packed;
    return;
  }
  problem_.packed = packed_.data();
  if (!int8) return backend.pack(p, packed_.data());
  const Int8Parameters quantised(p);
  p.parameters = quantised.data();
  backend.pack(p, packed_.data());
}

void Stream::expect_hidden_size(std::int64_t H) const {
  if (problem_.H != 0 && problem_.H != H)
    throw py::value_error("weights: expected those of " + std::to_string(problem_.H) +
                          " hidden units, as before, got " + std::to_string(H));
}

// ---- x ------------------------------------------------------------------------------------------

// The caller's x, held during a step.
class Stream::Reading {
 public:
  Reading(const Stream& stream, py::handle x, const View& view) {
    if (view.buffer && stream.format_ != '\0' && read_buffer(stream, x)) return;
    if (view.negatable && negation_pending(x)) {
      settled_ = x.attr("resolve_neg")();
      x = settled_;
    }
    const Array a(x, {"x"}, owners_);
    a.expect_dtype(stream.storage_).expect_shape({stream.problem_.B, stream.problem_.I});
    place_ = {a.data(), a.stride(0), a.stride(1)};
  }
  ~Reading() {
    if (held_) PyBuffer_Release(&buffer_);
  }
  Reading(const Reading&) = delete;
  Reading& operator=(const Reading&) = delete;

  const Place& place() const { return place_; }

 private:
  // For NumPy, without an allocation. False where x is not exactly as expected; Array then raises.
  bool read_buffer(const Stream& stream, py::handle x) {
    if (PyObject_GetBuffer(x.ptr(), &buffer_, PyBUF_RECORDS_RO) != 0) {
      PyErr_Clear();
      return false;
    }
    const auto item = static_cast<Py_ssize_t>(stream.item_);
    held_ = buffer_.ndim == 2 && buffer_.itemsize == item && buffer_.format != nullptr &&
            buffer_.shape != nullptr && buffer_.strides != nullptr &&
            buffer_.format[0] == stream.format_ && buffer_.format[1] == '\0' &&
            buffer_.shape[0] == stream.problem_.B && buffer_.shape[1] == stream.problem_.I &&
            buffer_.strides[0] % item == 0 && buffer_.strides[1] % item == 0 &&
            reinterpret_cast<std::uintptr_t>(buffer_.buf) % stream.item_ == 0;
    if (held_)
      place_ = {buffer_.buf, buffer_.strides[0] / item, buffer_.strides[1] / item};
    else
      PyBuffer_Release(&buffer_);
    return held_;
  }

  Place place_{};
  Py_buffer buffer_{};
  bool held_ = false;
  py::object settled_;
  Owners owners_;
};

// For a type not seen before the view has no output yet: x must be checked first.
Stream::View Stream::view_of(py::handle x) {
  auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x.ptr()));
  for (const View& view : views_)
    if (view.type.ptr() == type) return view;
  return {py::reinterpret_borrow<py::object>(type), py::object(),
          PyObject_CheckBuffer(x.ptr()) == 1, PyObject_HasAttrString(type, "is_neg") == 1};
}

void Stream::make_output(View& view, py::handle x) {
  constexpr std::size_t kMostTypes = 8;
  view.output = view_(py::cast(output_), x);
  if (views_.size() < kMostTypes) views_.push_back(view);
}

// A step must not write what it reads: x is copied where it overlaps the output, which a caller may
// feed back.
Stream::Place Stream::apart_from_output(const Place& x) {
  const auto item = static_cast<std::int64_t>(item_);
  const std::int64_t rows = (problem_.B - 1) * x.row * item,
                     units = (problem_.I - 1) * x.unit * item;
  const auto at = reinterpret_cast<std::intptr_t>(x.data);
  const auto output = reinterpret_cast<std::intptr_t>(output_.data());
  const std::intptr_t first =
      at + std::min<std::int64_t>(rows, 0) + std::min<std::int64_t>(units, 0);
  const std::intptr_t last =
      at + std::max<std::int64_t>(rows, 0) + std::max<std::int64_t>(units, 0) + item;
  if (last <= output || first >= output + output_.size() * item) return x;
  auto* to = static_cast<char*>(staged_.data());
  const auto* from = static_cast<const char*>(x.data);
  for (std::int64_t b = 0; b < problem_.B; ++b, to += problem_.I * item)
    copy_row(to, from + b * x.row * item, x.unit, problem_.I, item_);
  return {staged_.data(), problem_.I, 1};
}

// ---- a step -------------------------------------------------------------------------------------

void Stream::expect_idle() const {
  if (busy_)
    throw std::runtime_error(
        "this stream is in the middle of a step of another thread: "
        "use one stream for each thread");
}

// The workspace is sized for a number of threads, and again where that number changes.
void Stream::set_threads() {
  long threads = 0;
  if (threads_.is_none()) {
    threads = openmp::max_threads();
  } else {
    const auto answer = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(threads_.ptr()));
    threads = answer ? PyLong_AsLong(answer.ptr()) : -1;
    if (threads == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
  }
  threads = std::max(threads, 1L);
  if (threads == problem_.threads) return;
  Problem widest = problem_;
  widest.threads = static_cast<int>(threads);
  widest.input.unit = 0;  // strided rows of x are copied
  const std::size_t bytes = programs_.empty() ? cpu_backend().workspace_size(widest, Pass::forward)
                                              : programs_.workspace_size(widest.threads);
  if (workspace_.bytes() < bytes) workspace_ = Memory(bytes);
  problem_.threads = widest.threads;
  problem_.workspace = workspace_.data();
}

void Stream::run() {
  if (!programs_.empty()) return run_programs();
  if (!large_) return cpu_backend().forward(problem_);
  const WithoutGil no_gil;
  cpu_backend().forward(problem_);
}

void Stream::run_programs() {
  const int next = 1 - now_;
  const Sequence& x = problem_.input;
  const WithoutGil no_gil;
  programs_.run({x.data, x.row, x.unit, h_[now_].data(), c_[now_].data(), h_[next].data(),
                 c_[next].data(), output_.data()},
                problem_.threads, workspace_.data());
}

py::object Stream::step(py::handle x) {
  expect_idle();
  const Busy busy(busy_);  // from here on, since x's methods may let other threads run
  View view = view_of(x);
  const Reading reading(*this, x, view);
  if (!view.output) make_output(view, x);
  const Place from = apart_from_output(reading.place());
  problem_.input = {const_cast<void*>(from.data), 0, from.row, from.unit};
  set_threads();
  const int next = 1 - now_;
  problem_.h0.data = h_[now_].data();
  problem_.h_n = h_[next].data();
  if (has_c()) {
    problem_.c0.data = c_[now_].data();
    (half() ? problem_.cell : problem_.c_n) = c_[next].data();
  }
  run();
  now_ = next;
  return view.output;
}

// ---- the states ---------------------------------------------------------------------------------

void Stream::reset(py::handle mask) {
  expect_idle();
  Owners owners;
  const bool* rows = nullptr;
  std::int64_t stride = 0;
  if (!mask.is_none()) {
    const Array a(mask, {"rows"}, owners);
    a.expect_dtype({dlpack::kBool, 8, 1}).expect_shape({problem_.B});
    rows = static_cast<const bool*>(a.data());
    stride = a.stride(0);
  }
  const auto put = [&](Memory& state, const Memory& initial, std::int64_t units, std::size_t item) {
    const std::size_t bytes = static_cast<std::size_t>(units) * item;
    auto* to = static_cast<char*>(state.data());
    const auto* from = static_cast<const char*>(initial.data());
    for (std::int64_t l = 0; l < layers(); ++l, from += bytes)
      for (std::int64_t b = 0; b < problem_.B; ++b, to += bytes)
        if (rows == nullptr || rows[b * stride]) std::memcpy(to, from, bytes);
  };
  put(h_[now_], initial_h_, output_size(), item_);
  if (has_c()) put(c_[now_], initial_c_, problem_.H, c_item_);
}

py::tuple Stream::state() const {
  expect_idle();
  const auto copied = [&](const Memory& memory, std::int64_t units, dlpack::DataType dtype) {
    Tensor tensor = Tensor::empty({layers(), problem_.B, units}, dtype);
    std::memcpy(tensor.data(), memory.data(), memory.bytes());
    return tensor;
  };
  const Tensor h = copied(h_[now_], output_size(), storage_);
  if (!has_c()) return py::make_tuple(h);
  return py::make_tuple(h, copied(c_[now_], problem_.H, compute_));
}

void Stream::set_state(py::handle h, py::handle c) {
  expect_idle();
  Owners owners;
  const Array new_h(h, {has_c() ? "state[0]" : "state"}, owners);
  new_h.expect_dtype(storage_).expect_shape({layers(), problem_.B, output_size()});
  if (has_c()) {
    const Array new_c(c, {"state[1]"}, owners);
    new_c.expect_dtype(compute_).expect_shape({layers(), problem_.B, problem_.H});
    copy_state(c_[now_].data(), new_c, c_item_);
  }
  copy_state(h_[now_].data(), new_h, item_);
}

void Stream::set_initial(py::handle h, py::handle c) {
  expect_idle();
  Owners owners;
  const auto put = [&](py::handle object, const char* name, Memory& to, std::int64_t units,
                       dlpack::DataType dtype) {
    if (object.is_none()) {
      std::memset(to.data(), 0, to.bytes());
      return;
    }
    const Array a(object, {name}, owners);
    a.expect_dtype(dtype).expect_shape({layers(), 1, units});
    copy_state(to.data(), a, dtype.bits / 8);
  };
  put(h, "h_0", initial_h_, output_size(), storage_);
  if (has_c()) put(c, "c_0", initial_c_, problem_.H, compute_);
}

// ---- the Python side ----------------------------------------------------------------------------

namespace {

// A plain C function: pybind11's dispatcher would take as long as a small step.
PyObject* step_entry(PyObject* self, PyObject* x) {
  try {
    return py::cast<Stream&>(py::handle(self)).step(x).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc& error) {
    PyErr_SetString(PyExc_MemoryError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef step_method = {"step", step_entry, METH_O, "From x (B, I) to the output (B, O)."};

py::object bound_step(const py::object& self) {
  PyObject* function = PyCFunction_New(&step_method, self.ptr());
  if (function == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(function);
}

}  // namespace

void register_stream(py::module_& module) {
  using py::arg;
  py::class_<Stream>(module, "Stream", py::is_final())
      .def(py::init<const CheckedOptions&, py::handle, std::int64_t, const std::string&, py::object,
                    py::object, py::handle>(),
           arg("options"), arg("weights"), arg("batch_size"), arg("dtype"), arg("threads"),
           arg("view"), arg("programs"))
      .def_property_readonly("step", bound_step)
      .def("pack", &Stream::pack, arg("weights"), arg("programs"))
      .def("reset", &Stream::reset, arg("mask"))
      .def("state", &Stream::state)
      .def("set_state", &Stream::set_state, arg("h"), arg("c"))
      .def("set_initial", &Stream::set_initial, arg("h"), arg("c"))
      .def_property_readonly("input_size", &Stream::input_size)
      .def_property_readonly("hidden_size", &Stream::hidden_size)
      .def_property_readonly("output", [](const Stream& self) { return self.output(); });
}

}  // namespace fastrnn::bind
