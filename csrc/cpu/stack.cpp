// Describes the layers of a call (stack.h).
#include "stack.h"

#include <stdexcept>

#include "../cells/list.h"
#include "host.h"
#include "team.h"

namespace fastrnn {
namespace {

// ---- the cell and its kernels -------------------------------------------------------------------

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

const LayerKernels& kernels_of(const Problem& p) {
  const int cell = cell_entry(p.options).index;
  for (const InstructionSet* set = &chosen_set();; set = set->base) {
    if (p.options.int8 && set->int8) return set->int8[cell];
    if (p.options.int8 || !set->kernels) continue;
    const LayerKernels& found = set->kernels[cell].of[static_cast<int>(p.dtype)];
    if (found.forward) return found;
  }
}

std::size_t storage_bytes(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
std::size_t compute_bytes(DType d) { return d == DType::f64 ? 8 : 4; }

// ---- sizes and arrays ---------------------------------------------------------------------------

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

// Whether `products` products of `rows` rows each cost less with weights read in place than with
// weights packed first. Transposing a square of weights in registers costs as much as multiplying
// three rows by it. Packing costs as much as `turns` such transposes, more where the weights and
// their copy do not fit the core's own cache (measured: docs/kernels-cpu.md).
bool pays_in_place(std::int64_t products, std::int64_t rows, std::int64_t weights,
                   std::size_t bytes) {
  const auto size = static_cast<double>(weights) * static_cast<double>(bytes);
  const double turns = size <= kInnerBytes / 4 ? 3 : size <= kInnerBytes ? 6 : 8;
  return static_cast<double>(products) * (1 + static_cast<double>(rows) / 3) <= turns;
}

// Weights that few rows are multiplied by are read in place, where their rows are contiguous.
void read_in_place(const Stack& s, Layer& layer) {
  const std::int64_t outputs = s.cell.traits.gates * layer.H;
  layer.x_in_place = pays_in_place(1, s.pairs, outputs * layer.I, s.storage);
  layer.h_in_place = pays_in_place(s.p.T, s.p.B, outputs * layer.O, s.storage);
  for (std::int64_t d = 0; d < layer.directions; ++d) {
    const Parameters& p = layer.parameters[d];
    layer.x_in_place = layer.x_in_place && p.weight_ih.unit == 1;
    layer.h_in_place =
        layer.h_in_place && p.weight_hh.unit == 1 && (!p.weight_hr.data || p.weight_hr.unit == 1);
  }
}

}  // namespace

// ---- the stack ----------------------------------------------------------------------------------

CellEntry cell_entry(const Options& o) {
  CellEntry found{};
  if (!find_cell(AllCells{}, o, found))
    throw std::invalid_argument("cell: '" + o.cell + "' is not a cell of this engine");
  return found;
}

CellTraits cell_traits(const Options& options) { return cell_entry(options).traits; }

int cell_index(const Options& options) { return cell_entry(options).index; }

Stack::Stack(const Problem& problem, Pass which)
    : p(problem),
      pass(which),
      cell(cell_entry(problem.options)),
      kernels(kernels_of(problem)),
      O(problem.options.proj_size ? problem.options.proj_size : problem.H),
      storage(storage_bytes(problem.dtype)),
      compute(compute_bytes(problem.dtype)) {}

Stack plan_pass(const Problem& p, Pass pass, bool oversubscribed) {
  Stack s(p, pass);
  s.pairs = s.steps.pairs = count_pairs(p);
  s.saved_pairs = p.batch_sizes ? s.pairs : p.T * p.B;
  s.steps.T = p.T;
  s.steps.B = p.B;
  s.plan = make_plan(s, oversubscribed);
  return s;
}

Sequence normal(const Stack& s, Sequence a) {
  if (s.p.batch_sizes) a.step = a.row;
  return a;
}

Sequence contiguous(const Stack& s, void* data, std::int64_t width) {
  return normal(s, Sequence{data, s.p.B * width, width, 1});
}

// ---- a layer ------------------------------------------------------------------------------------

namespace {

// A state array from group g on.
State from_group(const State& a, std::int64_t g, std::size_t bytes) {
  return {shifted(a.data, g * a.group, bytes), a.group, a.row, a.unit};
}

// A sequence array of several layers, `stride` apart, from layer l on.
Sequence from_layer(const Stack& s, const Sequence& a, std::int64_t l, std::int64_t stride,
                    std::size_t bytes) {
  Sequence from = normal(s, a);
  from.data = shifted(a.data, l * stride, bytes);
  return from;
}

}  // namespace

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

// All layers after the first have the same size.
std::int64_t packed_before(const Stack& s, std::int64_t l) {
  if (l == 0) return 0;
  const std::size_t first = s.kernels.packed_size(describe_weights(s, 0));
  if (l == 1) return static_cast<std::int64_t>(first);
  const std::size_t later = s.kernels.packed_size(describe_weights(s, 1));
  return static_cast<std::int64_t>(first) + (l - 1) * static_cast<std::int64_t>(later);
}

Layer describe(const Stack& s, std::int64_t l) {
  const Problem& p = s.p;
  const std::int64_t D = p.options.directions, g = l * D;
  Layer layer = describe_weights(s, l);
  layer.rows = p.B;
  layer.d_above_width = D * s.O;
  layer.plan = s.plan;
  layer.single = s.single;
  layer.h0 = from_group(p.h0, g, s.storage);
  layer.wide_c0 = p.wide_c0;
  layer.c0 = from_group(p.c0, g, p.wide_c0 ? s.compute : s.storage);
  layer.reset_h = from_group(p.reset_h, g, s.storage);
  layer.reset_c = from_group(p.reset_c, g, s.storage);
  layer.h_n = shifted(p.h_n, g * p.B * s.O, s.storage);
  layer.c_n = shifted(p.c_n, g * p.B * p.H, s.storage);
  layer.cell = contiguous(s, shifted(p.cell, l * s.saved_pairs * D * p.H, s.compute), D * p.H);
  layer.saved_group = s.saved_pairs * s.cell.planes * padded(p.H);
  layer.saved = shifted(p.saved, g * layer.saved_group, s.compute);
  layer.consume_saved = p.consume_saved;
  layer.parameters_alone = p.parameters_alone;
  if (l == 0) {
    layer.input = normal(s, p.input);
  } else if (p.all_layers) {
    layer.input =
        contiguous(s, shifted(p.hidden, (l - 1) * s.saved_pairs * D * s.O, s.storage), D * s.O);
  }
  layer.packed = const_cast<void*>(p.packed);  // forward only reads it
  if (layer.packed && l > 0) layer.packed = shifted(layer.packed, packed_before(s, l), 1);
  if (s.pass == Pass::forward && layer.parameters) read_in_place(s, layer);
  layer.output = contiguous(
      s, shifted(p.hidden, p.all_layers ? l * s.saved_pairs * D * s.O : 0, s.storage), D * s.O);
  if (s.pass == Pass::forward && l == p.options.layers - 1)
    layer.copy = contiguous(s, p.output, D * s.O);
  return layer;
}

Layer describe_backward(const Stack& s, std::int64_t l) {
  const Problem& p = s.p;
  const std::int64_t g = l * p.options.directions;
  Layer layer = describe(s, l);
  if (l == p.options.layers - 1) layer.d_output = normal(s, p.d_output);
  layer.d_hidden = from_layer(s, p.d_hidden, l, p.d_hidden_layer, s.storage);
  layer.d_cell = from_layer(s, p.d_cell, l, p.d_cell_layer, s.compute);
  layer.d_h_n = from_group(p.d_h_n, g, s.storage);
  layer.d_c_n = from_group(p.d_c_n, g, s.storage);
  if (l == 0) layer.d_input = contiguous(s, p.d_input, p.I);
  layer.d_h0 = shifted(p.d_h0, g * p.B * s.O, s.storage);
  layer.d_c0 = shifted(p.d_c0, g * p.B * p.H, s.storage);
  layer.d_parameters = p.d_parameters ? p.d_parameters + g : nullptr;
  return layer;
}

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
    *state = from_group(*state, d, s.storage);
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

}  // namespace fastrnn
