// `_C.Program`: a step as a list of operations (csrc/program.h), checked once, run often.
#include "../program.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "argument.h"
#include "call.h"
#include "dtype.h"
#include "gil.h"
#include "memory.h"
#include "register.h"

namespace fastrnn::bind {
namespace {

using Index = std::int64_t;

// ---- a program from Python's tuples -------------------------------------------------------------

// One tuple of a program, read item by item.
class Items {
 public:
  Items(py::handle object, std::string place) : place_(std::move(place)) {
    if (!PyTuple_Check(object.ptr()) && !PyList_Check(object.ptr()))
      fail(std::string("expected a tuple, got ") + Py_TYPE(object.ptr())->tp_name);
    items_ = py::reinterpret_borrow<py::object>(object);
  }

  std::size_t size() const { return static_cast<std::size_t>(PySequence_Size(items_.ptr())); }
  void expect_size(std::size_t least, std::size_t most) const {
    if (size() < least || size() > most)
      fail("expected " + std::to_string(least) +
           (most > least ? " or " + std::to_string(most) : "") + " items, got " +
           std::to_string(size()));
  }
  py::object at(std::size_t i) const {
    return py::reinterpret_steal<py::object>(
        PySequence_GetItem(items_.ptr(), static_cast<Py_ssize_t>(i)));
  }
  bool absent(std::size_t i) const { return at(i).is_none(); }
  Index number(std::size_t i) const {
    const Index value = PyLong_AsLongLong(at(i).ptr());
    if (value == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      fail("item " + std::to_string(i) + ": expected an integer of 64 bits");
    }
    return value;
  }
  int small(std::size_t i) const {
    const Index value = number(i);
    if (value < -1 || value > (1 << 24))
      fail("item " + std::to_string(i) + ": expected -1 to 16777216, got " + std::to_string(value));
    return static_cast<int>(value);
  }
  std::string text(std::size_t i) const {
    const py::object item = at(i);
    if (!PyUnicode_Check(item.ptr())) fail("item " + std::to_string(i) + ": expected a str");
    return item.cast<std::string>();
  }
  RowAt row(std::size_t i) const { return {small(i), number(i + 1)}; }
  // Items i, i + 1, …, to one number each.
  void numbers(std::size_t i, std::initializer_list<Index*> to) const {
    for (Index* each : to) *each = number(i++);
  }
  // The position of item i among `names`.
  template <class Enum, std::size_t count>
  Enum one_of(std::size_t i, const char* const (&names)[count], const char* expected) const {
    const std::string name = text(i);
    const auto found = std::find(std::begin(names), std::end(names), name);
    if (found == std::end(names)) fail(std::string(expected) + ", got '" + name + "'");
    return static_cast<Enum>(found - std::begin(names));
  }
  Items items(std::size_t i) const { return {at(i), place_ + " item " + std::to_string(i)}; }

  [[noreturn]] void fail(const std::string& message) const {
    throw py::value_error(place_ + ": " + message);
  }

 private:
  py::object items_;
  std::string place_;
};

template <class Body>
void each(py::handle list, const char* name, Body body) {
  const Items items(list, name);
  for (std::size_t i = 0; i < items.size(); ++i)
    body(Items(items.at(i), std::string(name) + "[" + std::to_string(i) + "]"));
}

ProgramValue value_of(const Items& items) {
  items.expect_size(3, 4);
  ProgramValue value;
  value.home = items.one_of<Home>(
      0, kHomeNames, "home: expected shared, sequence, fixed, carry, next, block, local or tile");
  items.numbers(1, {&value.index, &value.width});
  if (items.size() == 4) value.previous = items.small(3);
  return value;
}

Point code_of(const Items& items) {
  const std::string name = items.text(0);
  for (int i = 0; i < kPoints; ++i)
    if (name == kPointNames[i].name) return static_cast<Point>(i);
  items.fail("'" + name + "' is no pointwise operation");
}

PointOperand operand_of(const Items& items, std::size_t i) {
  PointOperand operand;
  if (items.absent(i)) return operand;
  const Items parts = items.items(i);
  parts.expect_size(3, 3);
  operand.at = parts.row(0);
  const int scalar = PyObject_IsTrue(parts.at(2).ptr());
  if (scalar < 0) throw py::error_already_set();
  operand.kind = operand.at.value == -1 ? PointOperand::Kind::constant
                 : scalar != 0          ? PointOperand::Kind::scalar
                                        : PointOperand::Kind::vector;
  return operand;
}

PointOp point_of(const Items& items) {
  items.expect_size(5, 5);
  PointOp op;
  op.code = code_of(items);
  op.to = operand_of(items, 1);
  for (std::size_t j = 0; j < 3; ++j) op.from[j] = operand_of(items, 2 + j);
  return op;
}

Product product_of(const Items& items) {
  items.expect_size(17, 17);
  Product p;
  p.out = items.row(1);
  p.in = items.row(3);
  p.weight = items.row(5);
  items.numbers(7, {&p.G, &p.out_group, &p.in_group, &p.w_group, &p.w_k, &p.w_n, &p.K, &p.N});
  p.init = items.row(15);
  return p;
}

Reduce reduce_of(const Items& items) {
  items.expect_size(10, 12);
  Reduce r;
  constexpr const char* kinds[] = {"sum", "max", "moments", "means"};  // in the order of Kind
  r.kind = items.one_of<Reduce::Kind>(1, kinds, "expected 'sum', 'max', 'moments' or 'means'");
  r.out = items.row(2);
  r.in = items.row(4);
  items.numbers(6, {&r.G, &r.segment, &r.n, &r.element});
  if (items.size() > 10) r.second = items.row(10);
  return r;
}

Collect collect_of(const Items& items) {
  items.expect_size(7, 7);
  Collect c;
  c.out = items.row(1);
  c.in = items.row(3);
  c.count = items.number(5);
  c.table = items.small(6);
  return c;
}

Instruction instruction_of(const Items& items, ProgramText& text) {
  if (items.size() == 0) items.fail("expected an instruction");
  Instruction instruction;
  instruction.kind = items.one_of<Instruction::Kind>(0, Instruction::kNames,
                                                     "expected product, run, reduce or collect");
  switch (instruction.kind) {
    case Instruction::Kind::product:
      instruction.product = product_of(items);
      break;
    case Instruction::Kind::run: {
      items.expect_size(3, 3);
      const Items ops = items.items(2);
      instruction.run = {items.number(1), static_cast<Index>(text.points.size()),
                         static_cast<Index>(ops.size())};
      for (std::size_t i = 0; i < ops.size(); ++i) text.points.push_back(point_of(ops.items(i)));
      break;
    }
    case Instruction::Kind::reduce:
      instruction.reduce = reduce_of(items);
      break;
    case Instruction::Kind::collect:
      instruction.collect = collect_of(items);
  }
  return instruction;
}

PairSum sum_of(const Items& items) {
  if (items.size() == 0) items.fail("expected a reduction");
  const std::string kind = items.text(0);
  PairSum s;
  if (kind == "outer") {
    items.expect_size(15, 15);
    s.outer = true;
    s.x = items.row(5);
    items.numbers(7, {&s.G, &s.d_group, &s.x_group, &s.w_group, &s.w_k, &s.w_n, &s.K, &s.N});
  } else if (kind == "columns") {
    items.expect_size(6, 6);
    s.w_n = 1;
    s.N = items.number(5);
  } else {
    items.fail("expected outer or columns, got '" + kind + "'");
  }
  s.target = items.small(1);
  s.offset = items.number(2);
  s.d = items.row(3);
  return s;
}

// A list of integers, or a contiguous array of int32 or int64.
std::vector<Index> integers(py::handle object, const Items& place) {
  std::vector<Index> numbers;
  if (PyList_Check(object.ptr()) || PyTuple_Check(object.ptr())) {
    const Items items(object, "tables");
    for (std::size_t i = 0; i < items.size(); ++i) numbers.push_back(items.number(i));
    return numbers;
  }
  Owners owners;
  const Array array(object, Name{"tables"}, owners);
  array.expect_axes(1, "one axis").expect_contiguous().expect_host();
  const TypeInfo* type = find_type(array.dtype());
  const std::string name = type != nullptr ? type->name : "";
  if (name == "int64")
    numbers.assign(static_cast<const Index*>(array.data()),
                   static_cast<const Index*>(array.data()) + array.shape(0));
  else if (name == "int32")
    numbers.assign(static_cast<const std::int32_t*>(array.data()),
                   static_cast<const std::int32_t*>(array.data()) + array.shape(0));
  else
    place.fail("expected integers, int32 or int64, got " + type_name(array.dtype()));
  return numbers;
}

ProgramText text_of(const std::string& dtype, py::handle values, py::handle before, py::handle step,
                    py::handle after, py::handle reductions, py::handle constants,
                    py::handle tables) {
  ProgramText text;
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype: expected float32 or float64, got '" + dtype + "'");
  text.dtype = dtype == "float64" ? DType::f64 : DType::f32;
  each(values, "values", [&](const Items& v) { text.values.push_back(value_of(v)); });
  const std::pair<py::handle, const char*> phases[] = {
      {before, "before"}, {step, "step"}, {after, "after"}};
  for (int phase = 0; phase < kPhases; ++phase)
    each(phases[phase].first, phases[phase].second,
         [&](const Items& i) { text.phases[phase].push_back(instruction_of(i, text)); });
  each(reductions, "reductions", [&](const Items& s) { text.sums.push_back(sum_of(s)); });
  const Items numbers(constants, "constants");
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    const double value = PyFloat_AsDouble(numbers.at(i).ptr());
    if (PyErr_Occurred()) {
      PyErr_Clear();
      numbers.fail("item " + std::to_string(i) + ": expected a number");
    }
    text.constants.push_back(value);
  }
  each(tables, "tables", [&](const Items& t) {
    t.expect_size(2, 2);
    text.tables.push_back({integers(t.at(0), t), integers(t.at(1), t)});
  });
  return text;
}

// ---- a run --------------------------------------------------------------------------------------

Index expect_size(const char* name, Index size) {
  constexpr Index most = (Index{1} << 31) - 1;
  if (size < 0 || size > most)
    throw py::value_error(std::string(name) + ": expected 0 to " + std::to_string(most) + ", got " +
                          std::to_string(size));
  return size;
}

// Every array of a run, checked against what the program accesses.
class CheckedRun {
 public:
  CheckedRun(const Program& program, Index T, Index B, bool reverse, int threads)
      : program_(program) {
    call_.threads = threads;
    call_.reverse = reverse;
    dtype_ = data_type(program.text().dtype);
    call_.program = &program;
    call_.T = expect_size("T", T);
    call_.B = expect_size("B", B);
  }

  void set_shared(py::handle list) {
    const Items items = list_of(list, "shared", program_.shared.size());
    for (std::size_t i = 0; i < program_.shared.size(); ++i) {
      const Reach& reach = program_.shared[i];
      shared_.push_back(nullptr);
      if (reach.high < reach.low && reach.contiguous == 0) continue;
      const Array a = array(items.at(i), "shared", i);
      expect_reach(a, reach);
      shared_.back() = a.data();
    }
    call_.shared = shared_.data();
  }

  void set_sequences(py::handle list, py::handle first_list) {
    const std::size_t count = program_.sequences.size();
    const Items items = list_of(list, "sequences", count);
    const Items first_items = list_of(first_list, "firsts", count);
    for (std::size_t i = 0; i < count; ++i) {
      sequences_.emplace_back();
      const Index width = program_.sequences[i];
      if (width != 0) {
        const Array a = array(items.at(i), "sequences", i);
        a.expect_shape({call_.T, call_.B, width});
        expect_units(a, width, 2);
        if (program_.written[i]) {
          a.expect_writable();
          if (a.host()) ask_for_large_pages(a.data(), a.bytes());
          expect_rows_apart(a, width);
        }
        sequences_.back() = {a.data(), a.stride(0), a.stride(1), 1};
      }
      firsts_.push_back(state(first_items, i, "firsts", program_.previous[i] ? width : 0, true));
    }
    call_.sequences = sequences_.data();
    call_.firsts = firsts_.data();
  }

  void set_fixed(py::handle list) {
    const Items items = list_of(list, "fixed", program_.fixed.size());
    for (std::size_t i = 0; i < program_.fixed.size(); ++i)
      fixed_.push_back(state(items, i, "fixed", program_.fixed[i], false));
    call_.fixed = fixed_.data();
  }

  void set_states(py::handle inits, py::handle finals) {
    const std::size_t count = program_.states.size();
    const Items init_items = list_of(inits, "inits", count);
    const Items final_items = list_of(finals, "finals", count);
    for (std::size_t i = 0; i < count; ++i) {
      const Index width = program_.states[i];
      inits_.push_back(state(init_items, i, "inits", width, true));
      finals_.push_back(nullptr);
      const py::object given = final_items.at(i);
      if (width == 0 || given.is_none()) continue;
      const Array a = array(given, "finals", i);
      a.expect_shape({call_.B, width}).expect_contiguous().expect_writable();
      finals_.back() = a.data();
    }
    call_.inits = inits_.data();
    call_.finals = finals_.data();
  }

  void set_gradients(py::handle list) {
    const Items items = list_of(list, "gradients", program_.gradients.size());
    for (std::size_t i = 0; i < program_.gradients.size(); ++i) {
      const Reach& reach = program_.gradients[i];
      gradients_.push_back(nullptr);
      gradient_sizes_.push_back(0);
      if (reach.high < reach.low) continue;
      const Array a = array(items.at(i), "gradients", i);
      a.expect_contiguous().expect_writable();
      gradient_sizes_.back() = a.size();
      if (reach.high >= gradient_sizes_.back())
        a.complain("at least " + std::to_string(reach.high + 1) + " elements",
                   std::to_string(gradient_sizes_.back()));
      gradients_.back() = a.data();
    }
    call_.gradients = gradients_.data();
    call_.gradient_sizes = gradient_sizes_.data();
  }

  void run() {
    const Scratch scratch(program_workspace_size(call_));
    call_.workspace = scratch.data();
    const WithoutGil without_gil;
    run_program(call_);
  }

 private:
  // As many items as the program has arrays of a kind; None stands for an empty list.
  static Items list_of(py::handle list, const char* name, std::size_t count) {
    const Items items(list.is_none() ? py::handle(py::tuple()) : list, name);
    if (items.size() != count)
      items.fail("expected " + std::to_string(count) + " arrays, got " +
                 std::to_string(items.size()));
    return items;
  }

  Array array(const py::object& object, const char* name, std::size_t i) {
    Array a(object, Name{name, static_cast<Index>(i)}, owners_);
    a.expect_dtype(dtype_).expect_host();
    held_.push_back(object);
    return a;
  }

  static void expect_units(const Array& a, Index width, int axis) {
    if (width > 1 && a.stride(axis) != 1 && a.size() > 0)
      a.complain("contiguous units (a stride of 1 along the last axis)",
                 "a stride of " + std::to_string(a.stride(axis)));
  }

  // The rows are divided among the threads, so no two may overlap.
  static void expect_rows_apart(const Array& a, Index width) {
    int inner = 0, outer = 1;  // axes
    if (a.stride(0) > a.stride(1)) std::swap(inner, outer);
    const Index end = (a.shape(inner) - 1) * a.stride(inner) + width;
    if (a.size() > 0 && ((a.shape(inner) > 1 && a.stride(inner) < width) ||
                         (a.shape(outer) > 1 && a.stride(outer) < end)))
      a.complain("rows that do not overlap", "strides of " + std::to_string(a.stride(0)) + " and " +
                                                 std::to_string(a.stride(1)) + " elements");
  }

  static void expect_reach(const Array& a, const Reach& reach) {
    if (reach.contiguous > 0) {
      a.expect_contiguous();
      if (a.size() < reach.contiguous)
        a.complain("at least " + std::to_string(reach.contiguous) + " elements",
                   std::to_string(a.size()));
    }
    if (reach.high < reach.low) return;
    Index low = 0, high = a.size() > 0 ? 0 : -1;
    for (Index i = 0; i < a.ndim() && high >= 0; ++i) {
      const Index far = (a.shape(static_cast<int>(i)) - 1) * a.stride(static_cast<int>(i));
      (far < 0 ? low : high) += far;
    }
    if (reach.low < low || reach.high > high)
      a.complain("memory at offsets " + std::to_string(reach.low) + " to " +
                     std::to_string(reach.high) + ", which a product reads",
                 "offsets " + std::to_string(low) + " to " + std::to_string(high));
  }

  // (B, width); ignored where the width is 0.
  State state(const Items& items, std::size_t i, const char* name, Index width,
              bool may_be_absent) {
    const py::object given = items.at(i);
    if (width == 0 || (may_be_absent && given.is_none())) return {};
    const Array a = array(given, name, i);
    a.expect_shape({call_.B, width});
    expect_units(a, width, 1);
    return {a.data(), 0, a.stride(0), 1};
  }

  const Program& program_;
  dlpack::DataType dtype_{};
  ProgramCall call_;
  std::vector<const void*> shared_;
  std::vector<Sequence> sequences_;
  std::vector<State> firsts_, fixed_, inits_;
  std::vector<void*> finals_, gradients_;
  std::vector<Index> gradient_sizes_;
  Owners owners_;
  std::vector<py::object> held_;  // another thread may change the lists while the engine runs
};

void run(const Program& program, Index T, Index B, bool reverse, int threads, py::handle shared,
         py::handle sequences, py::handle firsts, py::handle fixed, py::handle inits,
         py::handle finals, py::handle gradients) {
  CheckedRun checked(program, T, B, reverse, checked_threads(threads));
  checked.set_shared(shared);
  checked.set_sequences(sequences, firsts);
  checked.set_fixed(fixed);
  checked.set_states(inits, finals);
  checked.set_gradients(gradients);
  checked.run();
}

// How a run of these sizes uses threads.
std::pair<int, const char*> team(const Program& program, Index T, Index B, int threads) {
  ProgramCall call;
  call.program = &program;
  call.T = expect_size("T", T);
  call.B = expect_size("B", B);
  call.threads = checked_threads(threads);
  const ProgramTeam team = program_team(call);
  return {team.threads, team.columns ? "columns" : "rows"};
}

}  // namespace

void register_program(py::module_& module) {
  using py::arg;
  py::class_<Program>(module, "Program", py::is_final())
      .def(py::init([](const std::string& dtype, py::handle values, py::handle before,
                       py::handle step, py::handle after, py::handle reductions,
                       py::handle constants, py::handle tables) {
             return Program(
                 text_of(dtype, values, before, step, after, reductions, constants, tables));
           }),
           arg("dtype"), arg("values"), arg("before"), arg("step"), arg("after"), arg("reductions"),
           arg("constants"), arg("tables"))
      .def("run", run, arg("T"), arg("B"), arg("reverse"), arg("threads"), arg("shared"),
           arg("sequences"), arg("firsts"), arg("fixed"), arg("inits"), arg("finals"),
           arg("gradients"))
      .def("team", team, arg("T"), arg("B"), arg("threads") = 0);
}

}  // namespace fastrnn::bind
