// The CPU's backend: picks the instruction set, lays out the workspace, and runs a stack layer by
// layer, each one parallel region.
#include "../backend.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "../cells/list.h"
#include "../steps.h"
#include "host.h"
#include "int8_layer.h"
#include "isa.h"
#include "layer.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrnn {
namespace {

// ---- instruction sets -------------------------------------------------------------------------

// Whether this CPU runs a set.
struct Runs {
  static bool portable() { return true; }
  static bool neon() { return true; }  // where it is built
#if defined(__x86_64__)
  static bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
  // By the processor's own word: not every compiler that is used here knows the name.
  static bool avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
  }
  static bool avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && avx2();
  }
  static bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }
  static bool avx512bf16() { return avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
};

// FASTRNN_SETS: a SET(name) for each that is built, widest first (CMakeLists.txt).
std::vector<const InstructionSet*> runnable_sets() {
  std::vector<const InstructionSet*> sets;
#define SET(name) \
  if (Runs::name()) sets.push_back(&name##_set);
  FASTRNN_SETS
#undef SET
  return sets;
}

const InstructionSet& choose_set() {
  const auto sets = runnable_sets();
  const char* wanted = std::getenv("FASTRNN_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("FASTRNN_ISA: '" + std::string(wanted) +
                              "' is not an instruction set that this CPU runs; it runs " + names);
}

}  // namespace

const InstructionSet& chosen_set() {
  static const InstructionSet& set = choose_set();
  return set;
}

namespace {

// ---- cells ------------------------------------------------------------------------------------

struct CellEntry {
  int index;  // of AllCells
  CellTraits traits;
  int planes;  // saved for a pair, wherever they are kept
};

template <class... Cells>
bool find_cell(CellList<Cells...>, const Options& o, CellEntry& found) {
  int index = -1;
  const auto try_cell = [&](const char* name, bool accepts, CellTraits traits) {
    ++index;
    if (o.cell != name || !accepts) return false;
    const int planes = traits.saved_planes + (o.proj_size ? 1 : 0);
    traits.saved_planes = o.recompute ? 0 : planes;
    found = {index, traits, planes};
    return true;
  };
  return (try_cell(Cells::name, Cells::accepts(o.maths) && (Cells::projects || o.proj_size == 0),
                   {Cells::gates, Cells::states, Cells::saved}) ||
          ...);
}

CellEntry cell_entry(const Options& o) {
  CellEntry found{};
  if (!find_cell(AllCells{}, o, found))
    throw std::invalid_argument("cell: '" + o.cell + "' is not a cell of this engine");
  return found;
}

const LayerKernels& kernels(const Problem& p) {
  const int cell = cell_entry(p.options).index;
  for (const InstructionSet* set = &chosen_set();; set = set->base) {
    if (!set->kernels) continue;
    const LayerKernels& found = set->kernels[cell].of[static_cast<int>(p.dtype)];
    if (found.forward) return found;
  }
}

// ---- sizes ------------------------------------------------------------------------------------

std::size_t storage_bytes(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
std::size_t compute_bytes(DType d) { return d == DType::f64 ? 8 : 4; }

void* shifted(void* p, std::int64_t elements, std::size_t bytes) {
  return p ? static_cast<char*>(p) + elements * static_cast<std::int64_t>(bytes) : nullptr;
}

// What a call's layers have in common.
struct Stack {
  const Problem& p;
  Pass pass;
  CellEntry cell;
  const LayerKernels& kernels;
  std::int64_t O, pairs, saved_pairs;
  std::size_t storage, compute;
  Steps steps;
  Plan plan, single;

  Stack(const Problem& problem, Pass which)
      : p(problem),
        pass(which),
        cell(cell_entry(problem.options)),
        kernels(fastrnn::kernels(problem)),
        O(problem.options.proj_size ? problem.options.proj_size : problem.H),
        storage(storage_bytes(problem.dtype)),
        compute(compute_bytes(problem.dtype)) {}

  bool in_parts() const { return pass == Pass::backward && p.options.recompute; }
  std::int64_t inputs(std::int64_t layer) const { return layer ? p.options.directions * O : p.I; }
};

// ---- how a team divides a layer -----------------------------------------------------------------
//
// By estimate, from the costs of host.h.

// The product of `rows` rows and `weights` weights, block of rows after block of rows. The first
// brings the weights from where they are, the others find them near. They are in the core's own
// cache where all that it reads between two such products, `among` weights, fits there.
double product_time(const Stack& s, double rows, double weights, double among) {
  const int depth = s.pass == Pass::forward ? s.kernels.depth : 1;
  const double rate = 2 * kClock * s.kernels.lanes * depth;  // products a nanosecond
  const double size = static_cast<double>(s.compute) / depth;
  const double blocks = std::ceil(rows / s.kernels.rows_per_block);
  const double block = weights * rows / blocks / rate;
  const double home = weights * size / (among * size <= kInnerBytes ? kInner : kOuter);
  return std::max(block, home) + (blocks - 1) * std::max(block, weights * size / kInner);
}

// A whole layer in one direction: `rows` and `columns` threads share its rows and its hidden units.
double layer_time(const Stack& s, int rows, int columns) {
  const Problem& p = s.p;
  const double T = static_cast<double>(p.T), G = s.cell.traits.gates;
  const double H = static_cast<double>(p.H), O = static_cast<double>(s.O);
  const double mine = std::ceil(static_cast<double>(p.B) / rows), threads = rows * columns;
  const double of_input = G * H * static_cast<double>(p.I) / columns,
               of_state = G * H * O / static_cast<double>(p.options.maths.heads) / columns;
  const double every = of_input + of_state;  // weights, between two calls
  const double project =
      product_time(s, std::ceil(static_cast<double>(s.pairs) / rows), of_input, every);
  const double cells = static_cast<double>(s.pairs) * H * kCell / threads;
  double step = product_time(s, mine, of_state, T > 1 ? of_state : every);
  if (columns > 1) step += kBarrier;
  return project + cells + T * step + (threads > 1 ? kRegion : 0);
}

// Of crowded cores no units are shared: their threads would wait for each other at every step.
// With Options::recompute backward runs the directions one after the other.
Plan make_plan(const Stack& s, bool crowded) {
  const Problem& p = s.p;
  Plan best;
  const int directions = s.in_parts() ? 1 : static_cast<int>(p.options.directions);
  const auto blocks =
      static_cast<int>((p.H + s.kernels.units_per_block - 1) / s.kernels.units_per_block);
  double least = kGain * directions * layer_time(s, 1, 1);
  for (int apart = 1; apart <= std::min(directions, p.threads); ++apart)
    for (int rows = 1; rows <= std::min<std::int64_t>(p.threads / apart, p.B); ++rows) {
      const int columns = crowded ? 1 : std::min(p.threads / apart / rows, blocks);
      const double time =
          layer_time(s, rows, columns) * (directions / apart) / (columns > 1 ? kGainOfUnits : 1) +
          (apart > 1 && rows * columns == 1 ? kRegion : 0);
      if (time >= least) continue;
      least = time;
      best = {apart * rows * columns, apart, rows, columns};
    }
  return best;
}

Sequence normal(const Stack& s, Sequence a) {
  if (s.p.batch_sizes) a.step = a.row;
  return a;
}

// A contiguous sequence array of `width` units.
Sequence contiguous(const Stack& s, void* data, std::int64_t width) {
  return normal(s, Sequence{data, s.p.B * width, width, 1});
}

// What a layer's packing depends on: sizes and parameters, no data.
Layer describe_weights(const Stack& s, std::int64_t l) {
  const Problem& p = s.p;
  Layer layer;
  layer.maths = p.options.maths;
  layer.steps = &s.steps;
  layer.directions = p.options.directions;
  layer.I = s.inputs(l);
  layer.H = p.H;
  layer.P = p.options.proj_size;
  layer.O = s.O;
  layer.parameters = p.parameters ? p.parameters + l * p.options.directions : nullptr;
  return layer;
}

// Bytes of the packed weights of the layers before `l`; those from the second on are of one size.
std::int64_t packed_before(const Stack& s, std::int64_t l) {
  if (l == 0) return 0;
  const std::size_t first = s.kernels.packed_size(describe_weights(s, 0));
  if (l == 1) return static_cast<std::int64_t>(first);
  const std::size_t later = s.kernels.packed_size(describe_weights(s, 1));
  return static_cast<std::int64_t>(first) + (l - 1) * static_cast<std::int64_t>(later);
}

// Whether `products` products of `rows` rows each cost less with weights read where they lie than
// with weights packed first. To turn them costs as much as to multiply three rows by them; packing
// costs as much as so many turns, the more the farther away they and their copy lie (measured:
// docs/kernels-cpu.md).
bool pays_in_place(std::int64_t products, std::int64_t rows, std::int64_t weights,
                   std::size_t bytes) {
  const auto size = static_cast<double>(weights) * static_cast<double>(bytes);
  const double turns = size <= kInnerBytes / 4 ? 3 : size <= kInnerBytes ? 6 : 8;
  return static_cast<double>(products) * (1 + static_cast<double>(rows) / 3) <= turns;
}

// The weights that few rows are multiplied by are read where they lie.
void read_in_place(const Stack& s, Layer& layer) {
  const std::int64_t outputs = s.cell.traits.gates * layer.H;
  layer.x_in_place = pays_in_place(1, s.pairs, outputs * layer.I, s.storage);
  layer.h_in_place = pays_in_place(s.p.T, s.p.B, outputs * layer.O / layer.maths.heads, s.storage);
  for (std::int64_t d = 0; d < layer.directions; ++d) {
    const Parameters& p = layer.parameters[d];
    layer.x_in_place = layer.x_in_place && p.weight_ih.unit == 1;
    layer.h_in_place =
        layer.h_in_place && p.weight_hh.unit == 1 && (!p.weight_hr.data || p.weight_hr.unit == 1);
  }
}

Layer describe(const Stack& s, std::int64_t l) {
  const Problem& p = s.p;
  const std::int64_t D = p.options.directions, g = l * D;
  Layer layer = describe_weights(s, l);
  layer.rows = p.B;
  layer.d_above_width = D * s.O;
  layer.plan = s.plan;
  layer.single = s.single;
  layer.h0 = p.h0;
  layer.h0.data = shifted(p.h0.data, g * p.h0.group, s.storage);
  layer.c0 = p.c0;
  layer.wide_c0 = p.wide_c0;
  layer.c0.data = shifted(p.c0.data, g * p.c0.group, p.wide_c0 ? s.compute : s.storage);
  layer.reset_h = p.reset_h;
  layer.reset_h.data = shifted(p.reset_h.data, g * p.reset_h.group, s.storage);
  layer.reset_c = p.reset_c;
  layer.reset_c.data = shifted(p.reset_c.data, g * p.reset_c.group, s.storage);
  layer.h_n = shifted(p.h_n, g * p.B * s.O, s.storage);
  layer.c_n = shifted(p.c_n, g * p.B * p.H, s.storage);
  layer.cell = contiguous(s, shifted(p.cell, l * s.saved_pairs * D * p.H, s.compute), D * p.H);
  layer.gates_group = s.saved_pairs * s.cell.planes * padded(p.H);
  layer.gates = shifted(p.gates, g * layer.gates_group, s.compute);
  layer.consume_gates = p.consume_gates;
  if (l == 0) {
    layer.input = normal(s, p.input);
  } else if (p.all_layers) {
    layer.input =
        contiguous(s, shifted(p.hidden, (l - 1) * s.saved_pairs * D * s.O, s.storage), D * s.O);
  }
  layer.packed = const_cast<void*>(p.packed);  // only read by forward
  if (layer.packed && l > 0) layer.packed = shifted(layer.packed, packed_before(s, l), 1);
  if (s.pass == Pass::forward && layer.parameters) read_in_place(s, layer);
  layer.output = contiguous(
      s, shifted(p.hidden, p.all_layers ? l * s.saved_pairs * D * s.O : 0, s.storage), D * s.O);
  if (s.pass == Pass::forward && l == p.options.layers - 1)
    layer.copy = contiguous(s, p.output, D * s.O);
  return layer;
}

// ---- the workspace ----------------------------------------------------------------------------

struct Workspace {
  void* steps;
  Barrier* barriers;
  void* between[2];  // what goes from layer to layer: outputs forward, gradients backward
  void* layer;       // the kernels' scratch
  // Where backward makes the gates again, part by part:
  void* part_steps;
  void* packed;              // weights of a layer's direction
  void* again;               // forward's scratch
  void* gates;               // of a part
  void *hidden, *h_n, *c_n;  // what forward writes again: [B, O], [B, O], [B, H]
  void *carry_h, *carry_c;   // what goes from part to part
  void* d_input;             // of the first layer's first direction, compute type
  std::size_t bytes;
};

// Steps of a part: about a sixteenth of the pairs, which is what backward keeps of the gates, but
// enough to be worth packing the weights for.
std::int64_t part_length(const Stack& s) {
  const std::int64_t pairs =
      std::min<std::int64_t>(std::max<std::int64_t>(s.pairs / 16, 256), 4096);
  const std::int64_t steps = pairs / std::max<std::int64_t>(s.p.B, 1);
  return std::min(std::max<std::int64_t>(steps, 1), std::max<std::int64_t>(s.p.T, 1));
}

void plan_stack(Stack& s, bool crowded) {
  s.saved_pairs = s.pairs;
  if (!s.p.batch_sizes) s.saved_pairs = s.p.T * s.p.B;
  s.plan = make_plan(s, crowded);
  s.single = Plan{};
}

// One direction of a layer, by itself.
Layer one_direction(const Stack& s, Layer layer, std::int64_t d) {
  const Problem& p = s.p;
  const std::int64_t O = s.O, H = p.H, B = p.B;
  const auto shift = [&](auto& array, std::int64_t elements, std::size_t bytes) {
    array.data = shifted(array.data, d * elements, bytes);
  };
  layer.directions = 1;
  layer.reverse = d == 1;
  for (State* state :
       {&layer.h0, &layer.c0, &layer.reset_h, &layer.reset_c, &layer.d_h_n, &layer.d_c_n})
    shift(*state, state->group, s.storage);
  if (layer.parameters) layer.parameters += d;
  if (layer.d_parameters) layer.d_parameters += d;
  shift(layer.output, O, s.storage);
  shift(layer.cell, H, s.compute);
  shift(layer.d_output, O * layer.d_output.unit, s.storage);
  shift(layer.d_hidden, O * layer.d_hidden.unit, s.storage);
  shift(layer.d_cell, H * layer.d_cell.unit, s.compute);
  layer.d_above = shifted(layer.d_above, d * O, s.compute);
  layer.d_h0 = shifted(layer.d_h0, d * B * O, s.storage);
  layer.d_c0 = shifted(layer.d_c0, d * B * H, s.storage);
  return layer;
}

std::size_t layer_scratch(const Stack& s) {
  const Problem& p = s.p;
  std::size_t most = 0;
  static char present;  // stands for a gradient that will be given
  for (std::int64_t l = 0; l < std::min<std::int64_t>(p.options.layers, 2); ++l) {
    Layer layer = describe(s, l);
    if (l || p.d_input) layer.d_below = &present;
    layer.d_output = p.d_output;
    layer.d_hidden = p.d_hidden;
    Steps part = s.steps;
    if (s.in_parts()) {
      layer = one_direction(s, layer, 0);
      layer.part = true;
      part.T = part_length(s);
      part.pairs = part.T * p.B;
      layer.steps = &part;
      layer.consume_gates = true;
      layer.gates = &present;
    }
    const std::size_t bytes = s.pass == Pass::forward ? s.kernels.forward_scratch(layer)
                                                      : s.kernels.backward_scratch(layer);
    most = std::max(most, bytes);
  }
  return most;
}

void lay_out_parts(const Stack& s, Pieces& pieces, Workspace& w) {
  const Problem& p = s.p;
  static char present;  // stands for packed weights and for gates that are kept
  const std::int64_t steps = part_length(s), pairs = steps * p.B;
  const auto elements = [](std::int64_t count, std::size_t bytes) {
    return static_cast<std::size_t>(count) * bytes;
  };
  std::size_t packed = 0, again = 0;
  for (std::int64_t l = 0; l < std::min<std::int64_t>(p.options.layers, 2); ++l) {
    Layer layer = one_direction(s, describe(s, l), 0);
    Steps part = s.steps;
    part.T = steps;
    part.pairs = pairs;
    layer.steps = &part;
    packed = std::max(packed, s.kernels.packed_size(layer));
    layer.packed = layer.gates = &present;
    again = std::max(again, s.kernels.forward_scratch(layer));
  }
  w.part_steps = pieces.take(part_size(p, steps));
  w.packed = pieces.take(packed);
  w.again = pieces.take(again);
  w.gates = pieces.take(elements(pairs * s.cell.planes * padded(p.H), s.compute));
  w.hidden = pieces.take(elements(p.B * s.O, s.storage));
  w.h_n = pieces.take(elements(p.B * s.O, s.storage));
  w.c_n = pieces.take(elements(p.B * p.H, s.storage));
  w.carry_h = pieces.take(elements(p.B * padded(s.O), s.compute));
  w.carry_c = pieces.take(elements(p.B * padded(p.H), s.compute));
  if (p.options.directions > 1 && p.d_input)
    w.d_input = pieces.take(elements(s.saved_pairs * p.I, s.compute));
}

Workspace lay_out(const Stack& s, void* base) {
  const Problem& p = s.p;
  Pieces pieces{static_cast<char*>(base)};
  Workspace w{};
  w.steps = pieces.take(steps_size(p));
  w.barriers = static_cast<Barrier*>(
      pieces.take(sizeof(Barrier) * static_cast<std::size_t>(1 + s.plan.threads)));
  const std::int64_t width = p.options.directions * s.O;
  const bool forward = s.pass == Pass::forward;
  const std::int64_t many = p.options.layers - 1;  // layer borders
  if (!forward || !p.all_layers)
    for (std::int64_t i = 0; i < std::min<std::int64_t>(many, 2); ++i)
      w.between[i] = pieces.take(static_cast<std::size_t>(s.saved_pairs * width) *
                                 (forward ? s.storage : s.compute));
  w.layer = pieces.take(layer_scratch(s));
  if (s.in_parts()) lay_out_parts(s, pieces, w);
  w.bytes = pieces.used;
  return w;
}

std::int64_t count_pairs(const Problem& p) {
  std::int64_t pairs = 0;
  if (p.batch_sizes)
    for (std::int64_t t = 0; t < p.T; ++t) pairs += p.batch_sizes[t];
  else if (p.lengths)
    for (std::int64_t b = 0; b < p.B; ++b) pairs += p.lengths[b];
  else
    pairs = p.T * p.B;
  return pairs;
}

Stack prepare(const Problem& p, Pass pass, bool crowded) {
  Stack s(p, pass);
  s.pairs = s.steps.pairs = count_pairs(p);
  s.steps.T = p.T;
  s.steps.B = p.B;
  plan_stack(s, crowded);
  return s;
}

// Enough for either plan: which it is to be is seen when the pass begins.
std::size_t workspace_size(const Problem& p, Pass pass) {
  if (p.int8) return int8_workspace_size(p);
  const std::size_t usual = lay_out(prepare(p, pass, false), nullptr).bytes;
  return p.threads > 1 ? std::max(usual, lay_out(prepare(p, pass, true), nullptr).bytes) : usual;
}

// ---- running ----------------------------------------------------------------------------------

struct Task {
  const Layer& layer;
  void (*run)(const Layer&, int, int);
};

void run_layer(const Layer& layer, void (*run)(const Layer&, int, int)) {
  Task task{layer, run};
  for (int i = 0; layer.barriers && i <= layer.plan.threads; ++i) layer.barriers[i].forget();
  run_threads(
      layer.plan.threads,
      [](void* argument, int thread, int threads) {
        const Task& t = *static_cast<const Task*>(argument);
        t.run(t.layer, thread, threads);
      },
      &task);
}

std::size_t packed_size(const Problem& p) {
  if (p.int8) return int8_packed_size(p);
  const Stack s(p, Pass::forward);
  return static_cast<std::size_t>(packed_before(s, p.options.layers));
}

void pack(const Problem& p, void* to) {
  if (p.int8) return int8_pack(p, to);
  const Stack s(p, Pass::forward);
  const std::int64_t weights = s.cell.traits.gates * p.H * (p.I + s.O);
  for (std::int64_t l = 0; l < p.options.layers; ++l) {
    Layer layer = describe_weights(s, l);
    layer.packed = shifted(to, packed_before(s, l), 1);
    layer.plan.threads = weights < kRegionWeights ? 1 : p.threads;
    run_layer(layer, s.kernels.pack);
  }
}

void forward(const Problem& p) {
  if (p.int8) return int8_forward(p);
  Stack s = prepare(p, Pass::forward, cores_are_crowded());
  const Workspace w = lay_out(s, p.workspace);
  s.steps = build_steps(p, w.steps);
  const Barriers barriers(w.barriers, 1 + s.plan.threads);
  const std::int64_t L = p.options.layers, width = p.options.directions * s.O;
  Sequence previous = normal(s, p.input);
  for (std::int64_t l = 0; l < L; ++l) {
    Layer layer = describe(s, l);
    layer.barriers = w.barriers;
    layer.scratch = w.layer;
    layer.input = previous;
    if (!p.all_layers && l < L - 1) layer.output = contiguous(s, w.between[l % 2], width);
    run_layer(layer, s.kernels.forward);
    previous = layer.output;
  }
}

// Rows of a kept sequence at one step, as the state after it.
State state_at(const Steps& steps, const Sequence& a, std::int64_t t, std::size_t bytes) {
  return {shifted(a.data, steps.position[t] * a.step, bytes), 0, a.row, a.unit};
}

// Runs a layer backward in parts of its steps, direction by direction: forward once more, for the
// gates of the part, then backward, from the last part of the walk to the first. Every value
// of a part comes out as it did in the whole.
class Parts {
 public:
  Parts(const Stack& s, const Workspace& w) : s_(s), w_(w), length_(part_length(s)) {}

  void run(const Layer& whole) {
    const std::int64_t D = whole.directions, count = (s_.p.T + length_ - 1) / length_;
    for (std::int64_t d = 0; d < D; ++d) {
      Layer layer = one_direction(s_, whole, d);
      layer.part = true;
      share_input_gradient(whole, d, layer);
      layer.packed = w_.packed;
      run_layer(layer, s_.kernels.pack);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t begin = (layer.reverse ? i : count - 1 - i) * length_;
        layer.starts_sums = i == 0;
        layer.ends_sums = i == count - 1;
        run_part(layer, begin, std::min(length_, s_.p.T - begin));
      }
    }
  }

 private:
  // dx is a sum over the directions: the first leaves its part for the second to go on with.
  void share_input_gradient(const Layer& whole, std::int64_t d, Layer& layer) const {
    if (whole.directions == 1 || !(whole.d_below || whole.d_input.data)) return;
    void* between = whole.d_below ? whole.d_below : w_.d_input;
    if (d == 0) {
      layer.d_below = between;
      layer.d_input = {};
    } else {
      layer.d_input_before = between;
    }
  }

  void run_part(Layer layer, std::int64_t begin, std::int64_t count) {
    const Steps& all = s_.steps;
    const Steps steps = build_part(all, begin, count, w_.part_steps);
    const std::int64_t end = begin + count, first = all.offset[begin];
    const std::int64_t after = end < all.T ? all.active[end] : 0;
    const std::int64_t here = begin > 0 ? steps.B : 0;
    layer.steps = &steps;
    layer.rows_before = layer.reverse ? after : here;
    layer.rows_after = layer.reverse ? here : after;
    if (layer.rows_before > 0) {
      const std::int64_t t = layer.reverse ? end : begin - 1;
      layer.h_before = state_at(all, layer.output, t, s_.storage);
      layer.c_before = state_at(all, layer.cell, t, s_.compute);
    }
    layer.gates = w_.gates;
    run_layer(forward_again(layer), s_.kernels.forward);
    layer.consume_gates = true;
    layer.carry_h = w_.carry_h;
    layer.carry_c = w_.carry_c;
    layer.d_above = shifted(layer.d_above, first * layer.d_above_width, s_.compute);
    layer.d_below = shifted(layer.d_below, first * layer.I, s_.compute);
    layer.d_input_before = shifted(layer.d_input_before, first * layer.I, s_.compute);
    run_layer(layer, s_.kernels.backward);
  }

  // Of its results only the gates are new.
  Layer forward_again(Layer layer) const {
    layer.scratch = w_.again;
    layer.output = {w_.hidden, 0, s_.O, 1};
    layer.cell = {};
    layer.h_n = w_.h_n;
    layer.c_n = w_.c_n;
    return layer;
  }

  const Stack& s_;
  const Workspace& w_;
  const std::int64_t length_;
};

void clear_input_gradient(const Stack& s) {
  const Problem& p = s.p;
  if (p.d_input && s.steps.padding)
    std::memset(p.d_input, 0, static_cast<std::size_t>(p.T * p.B * p.I) * s.storage);
}

void backward(const Problem& p) {
  Stack s = prepare(p, Pass::backward, cores_are_crowded());
  const Workspace w = lay_out(s, p.workspace);
  s.steps = build_steps(p, w.steps);
  const Barriers barriers(w.barriers, 1 + s.plan.threads);
  const std::int64_t L = p.options.layers, D = p.options.directions;
  if (s.in_parts()) clear_input_gradient(s);
  for (std::int64_t l = L - 1; l >= 0; --l) {
    const std::int64_t g = l * D;
    Layer layer = describe(s, l);
    layer.barriers = w.barriers;
    layer.scratch = w.layer;
    if (l == L - 1)
      layer.d_output = normal(s, p.d_output);
    else
      layer.d_above = w.between[l % 2];
    layer.d_hidden = normal(s, p.d_hidden);
    layer.d_hidden.data = shifted(p.d_hidden.data, l * p.d_hidden_layer, s.storage);
    layer.d_cell = normal(s, p.d_cell);
    layer.d_cell.data = shifted(p.d_cell.data, l * p.d_cell_layer, s.compute);
    layer.d_h_n = p.d_h_n;
    layer.d_h_n.data = shifted(p.d_h_n.data, g * p.d_h_n.group, s.storage);
    layer.d_c_n = p.d_c_n;
    layer.d_c_n.data = shifted(p.d_c_n.data, g * p.d_c_n.group, s.storage);
    if (l > 0)
      layer.d_below = w.between[(l - 1) % 2];
    else
      layer.d_input = contiguous(s, p.d_input, p.I);
    layer.d_h0 = shifted(p.d_h0, g * p.B * s.O, s.storage);
    layer.d_c0 = shifted(p.d_c0, g * p.B * p.H, s.storage);
    layer.d_parameters = p.d_parameters ? p.d_parameters + g : nullptr;
    if (s.in_parts())
      Parts(s, w).run(layer);
    else
      run_layer(layer, s.kernels.backward);
  }
}

// ---- ensembles --------------------------------------------------------------------------------

// How many threads share the problems out, each running one by itself: all of them, or one where a
// team for each problem in turn is faster, by the estimate above.
int sharing_threads(const Problem& p, std::int64_t count, Pass pass) {
  const auto threads = static_cast<int>(std::min<std::int64_t>(p.threads, count));
  if (threads <= 1) return 1;
  const Stack s = prepare(p, pass, false);
  const double alone = static_cast<double>(p.options.directions) * layer_time(s, 1, 1);
  const double team = layer_time(s, s.plan.row_threads, s.plan.column_threads) *
                      static_cast<double>(p.options.directions) / s.plan.direction_threads;
  const double rounds = std::ceil(static_cast<double>(count) / threads);
  const double layers = static_cast<double>(p.options.layers);
  const bool apart = rounds * layers * alone + kRegion < static_cast<double>(count) * layers * team;
  return apart ? threads : 1;
}

// Scratch of one problem at a time.
std::size_t most_workspace(const Problem* problems, std::int64_t count, Pass pass, bool by_itself) {
  std::size_t most = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    Problem p = problems[i];
    if (by_itself) p.threads = 1;
    most = std::max(most, workspace_size(p, pass));
  }
  return (most + 63) / 64 * 64;
}

std::size_t ensemble_workspace_size(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  return most_workspace(problems, count, pass, threads > 1) * static_cast<std::size_t>(threads);
}

struct Ensemble {
  const Problem* problems;
  std::int64_t count;
  Pass pass;
  bool by_itself;     // each on one thread
  std::size_t bytes;  // of a thread's scratch
  std::atomic<std::int64_t> next{0};

  void run(int thread) {
    for (std::int64_t i = next++; i < count; i = next++) {
      Problem p = problems[i];
      if (by_itself) p.threads = 1;
      p.workspace =
          static_cast<char*>(problems[0].workspace) + bytes * static_cast<std::size_t>(thread);
      (pass == Pass::forward ? forward : backward)(p);
    }
  }
};

void run_ensemble(const Problem* problems, std::int64_t count, Pass pass) {
  const int threads = sharing_threads(problems[0], count, pass);
  Ensemble ensemble{problems, count, pass, threads > 1, 0};
  ensemble.bytes = most_workspace(problems, count, pass, threads > 1);
  run_threads(
      threads,
      [](void* argument, int thread, int) { static_cast<Ensemble*>(argument)->run(thread); },
      &ensemble);
}

}  // namespace

const Backend& cpu_backend() {
  static constexpr Backend backend{workspace_size,          packed_size, pack, forward, backward,
                                   ensemble_workspace_size, run_ensemble};
  return backend;
}

CellTraits cell_traits(const Options& options) { return cell_entry(options).traits; }

int cell_index(const Options& options) { return cell_entry(options).index; }

const char* cpu_isa() { return chosen_set().name; }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const InstructionSet* set : runnable_sets()) names.emplace_back(set->name);
  return names;
}

}  // namespace fastrnn
