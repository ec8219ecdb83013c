// One layer whose recurrence is one launch of a persistent kernel (persistent.h).
//
// Forward     the projections of all steps, added to the biases, as matrix products; then the
//             kernel.
// Backward    the kernel, then the gradients without a recurrence (gradients.h). It saves and
//             returns the same values as the step kernels, so backward of either kind works after
//             forward of the other.
// Rows        lengths are sorted on the device, so that the active rows of a step are the first
//             ones; separate launches zero the pairs that do not run, which the kernel does not
//             write. Resets are read in place if they are contiguous.
// Heads       are the groups of teams of a launch, instead of the directions, each with its own
//             block of W_hh and its own units of every array; each direction is then a separate
//             launch.
// Layouts     x_gates   [D][pairs][gates·H], float
//             weights   [D][head][gates·H/heads][H/heads], storage
//             d_gates   [D][pairs][gradients·H], storage; or, for float32, it overwrites forward's
//                       saved values if the caller allows it
//             Sequences and states are the caller's arrays with their strides. Before the launch,
//             arrays with units that are not contiguous are copied, and gradients of outputs from
//             several sources are added.
// Cost        in addition to the kernel: x_gates is written, read and written by the product, and
//             read; the rest has the size of one step, or is small compared with the gates.
#pragma once

#include <limits>
#include <type_traits>

#include "backward.h"
#include "persistent.h"

namespace fastrnn::cuda {

// The maximum size in bytes of the projections of a whole sequence in the workspace.
inline constexpr Index kMostProjected = Index{4} << 30;

// The storage type of the persistent kernels.
template <class S>
using Stored = std::conditional_t<std::is_same_v<S, float>, float, std::uint16_t>;

template <class Cell, class S>
inline constexpr bool has_persistent =
    !std::is_same_v<S, double> && !DeviceCell<Cell, S>::two_products;

template <class S>
persistent::OperandKind operand_kind(bool allow_tf32) {
  if (std::is_same_v<S, Bf16>) return persistent::OperandKind::bfloat16;
  if (std::is_same_v<S, F16>) return persistent::OperandKind::float16;
  return allow_tf32 ? persistent::OperandKind::tf32 : persistent::OperandKind::float32;
}

// LayerFunctions::persistent_sizes.
template <class Cell, class S>
const char* persistent_sizes(const Layer& layer, Pass pass, persistent::Sizes* sizes) {
  constexpr Index most = std::numeric_limits<int>::max();
  const Index T = layer.rows.T, B = layer.rows.B, H = layer.H, D = layer.directions;
  if (std::is_same_v<S, double>) return "float64 has no persistent kernel";
  if (DeviceCell<Cell, S>::two_products) return "reset_after=False has no persistent kernel";
  if (layer.P) return "proj_size has no persistent kernel";
  if (T < 1 || B < 1 || H < 1) return "the problem is empty";
  if (T > most || B > most || H > most) return "T, B or H exceeds 31 bits";
  if (pass == Pass::forward && D * layer.rows.pairs * Cell::gates * H > kMostProjected / 4)
    return "the projections of all steps take more than 4 GiB";
  const Index heads = layer.maths.heads;
  *sizes = {Cell::name,
            operand_kind<S>(layer.tools.allow_tf32),
            pass,
            static_cast<int>(T),
            static_cast<int>(B),
            static_cast<int>(H / heads),
            static_cast<int>(heads > 1 ? heads : D)};
  return nullptr;
}

// ---- kernels before and after a launch ----------------------------------------------------------

// Sorts rows by decreasing length, stably, and counts the active rows of each step.
struct SortRows {
  static constexpr const char* name = "rows by length";
  Rows rows;
  Index* active;  // [T]
  Index* order;   // [B]; null: the rows are sorted already

  FASTRNN_CELL Index count() const { return rows.T + (order ? rows.B : 0); }
  FASTRNN_CELL void element(Index n) const {
    const Index row = n - rows.T, length = row < 0 ? n + 1 : rows.length(row);
    Index before = 0;
    for (Index i = 0; i < rows.B; ++i) {
      const Index other = rows.length(i);
      before += row < 0 ? other >= length : other > length || (other == length && i < row);
    }
    (row < 0 ? active[n] : order[before]) = row < 0 ? before : row;
  }
};

struct GatherResets {
  static constexpr const char* name = "resets";
  Rows rows;
  std::uint8_t* to;

  FASTRNN_CELL Index count() const { return rows.pairs; }
  FASTRNN_CELL void element(Index n) const {
    to[n] = rows.reset[n / rows.B * rows.reset_step + n % rows.B * rows.reset_row];
  }
};

// Zeros for the pairs that do not run.
template <class T>
struct ClearPadding {
  static constexpr const char* name = "padding";
  Rows rows;
  T* to;
  Index width;

  FASTRNN_CELL Index count() const { return rows.pairs * width; }
  FASTRNN_CELL void element(Index n) const {
    Index t = 0, i = 0;
    rows.find(n / width, t, i);
    if (!rows.active(t, i)) to[n] = T{};
  }
};

// The same row for every pair.
template <class C>
struct RepeatRow {
  static constexpr const char* name = "biases of all pairs";
  const C* row;
  Index width, size;
  C* to;

  FASTRNN_CELL Index count() const { return size; }
  FASTRNN_CELL void element(Index n) const { to[n] = row[n % width]; }
};

template <class S>
struct CopyState {
  static constexpr const char* name = "states";
  State from;
  Index B, H, size;
  S* to;

  FASTRNN_CELL Index count() const { return size; }
  FASTRNN_CELL void element(Index n) const {
    const Index u = n % H, i = n / H % B, d = n / H / B;
    to[n] = static_cast<const S*>(from.data)[d * from.group + i * from.row + u * from.unit];
  }
};

template <class T>
struct CopySequence {
  static constexpr const char* name = "gradients of the cells";
  Rows rows;
  Sequence from;
  Index width;
  T* to;

  FASTRNN_CELL Index count() const { return rows.pairs * width; }
  FASTRNN_CELL void element(Index n) const {
    Index t = 0, i = 0;
    rows.find(n / width, t, i);
    to[n] = rows.at<const T>(from, t, i)[n % width * from.unit];
  }
};

// The sum of the gradients of the output from all sources.
template <class S>
struct AddOutputGradients {
  static constexpr const char* name = "gradients of the output";
  using C = typename ComputeOf<S>::type;
  BackwardData<S> a;
  C* to;

  FASTRNN_CELL Index count() const { return a.rows.pairs * a.D * a.O; }
  FASTRNN_CELL void element(Index n) const {
    const Index column = n % (a.D * a.O);
    Index t = 0, i = 0;
    a.rows.find(n / (a.D * a.O), t, i);
    to[n] = a.output_gradient(column / a.O, t, i, column % a.O);
  }
};

// ---- a layer's arrays for the kernels -----------------------------------------------------------

class PersistentRows {
 public:
  void lay_out(const Layer& layer, Arena& arena) {
    const Rows& rows = layer.rows;
    packed_ = layer.batch_sizes != nullptr;
    padded_ = rows.lengths != nullptr;
    scattered_ = rows.reset && !(rows.reset_row == 1 && rows.reset_step == rows.B);
    active_ = arena.take<Index>(packed_ || padded_ ? rows.T : 0);
    order_ = arena.take<Index>(padded_ ? rows.B : 0);
    fresh_ = arena.take<std::uint8_t>(scattered_ ? rows.pairs : 0);
  }

  void prepare(const Layer& layer) const {
    if (active_) launch_elements(layer.tools.stream, SortRows{layer.rows, active_, order_});
    if (fresh_) launch_elements(layer.tools.stream, GatherResets{layer.rows, fresh_});
  }

  persistent::StepTable table(const Layer& layer) const {
    const Rows& rows = layer.rows;
    persistent::StepTable steps;
    steps.T = static_cast<int>(rows.T), steps.B = static_cast<int>(rows.B);
    steps.active = active_, steps.order = order_;
    steps.offset = steps.position = rows.offset;
    steps.fresh = scattered_ ? fresh_ : reinterpret_cast<const std::uint8_t*>(rows.reset);
    return steps;
  }

  // Zeroes the inactive pairs of an array [pairs][width] that the kernel writes.
  template <class T>
  void clear_padding(const Layer& layer, T* to, Index width) const {
    if (padded_) launch_elements(layer.tools.stream, ClearPadding<T>{layer.rows, to, width});
  }

  // The units must be contiguous; `group`: elements from one direction to the next.
  template <class T>
  persistent::SequenceOf<T> sequence(const Sequence& s, Index group) const {
    return {static_cast<T*>(s.data), group, packed_ ? s.row : s.step, s.row};
  }
  // [pairs][D·H].
  template <class T>
  persistent::SequenceOf<T> contiguous(const Layer& layer, T* data) const {
    const Index width = layer.directions * layer.H;
    return {data, layer.H, packed_ ? width : layer.rows.B * width, width};
  }

 private:
  bool packed_ = false, padded_ = false, scattered_ = false;
  Index *active_ = nullptr, *order_ = nullptr;
  std::uint8_t* fresh_ = nullptr;
};

// A state that is read, copied if its units are not contiguous.
template <class S>
class PersistentState {
 public:
  void lay_out(const Layer& layer, const State& state, Arena& arena) {
    from_ = state;
    size_ = layer.directions * layer.rows.B * layer.H;
    copy_ = arena.take<S>(state.data && state.unit != 1 ? size_ : 0);
  }
  void prepare(const Layer& layer) const {
    if (copy_)
      launch_elements(layer.tools.stream, CopyState<S>{from_, layer.rows.B, layer.H, size_, copy_});
  }
  persistent::StateOf<const Stored<S>> get(const Layer& layer) const {
    const auto* data = static_cast<const Stored<S>*>(copy_ ? copy_ : from_.data);
    if (copy_) return {data, layer.rows.B * layer.H, layer.H};
    return {data, from_.group, from_.row};
  }

 private:
  State from_;
  Index size_ = 0;
  S* copy_ = nullptr;
};

// A state that is written: [D][B][H].
template <class S>
persistent::StateOf<Stored<S>> written_state(const Layer& layer, void* data) {
  return {static_cast<Stored<S>*>(data), layer.rows.B * layer.H, layer.H};
}

// W_hh of all directions, [D][head][gates·H/heads][H/heads].
template <class Cell, class S>
void pack_recurrent(const Layer& layer, S* to) {
  const Index rows = DeviceCell<Cell, S>::gates * layer.H, heads = layer.maths.heads;
  const Index units = layer.H / heads;
  for (Index d = 0; d < layer.directions; ++d) {
    const fastrnn::Weight& w = layer.parameters[d].weight_hh;
    launch_elements(layer.tools.stream,
                    PackWeights<S>{static_cast<const S*>(w.data), w.row, w.unit, rows, units, units,
                                   to + d * rows * units, units, heads_of(rows, heads), w.head, 0});
  }
}

// The first group of teams that runs backwards in time in the launch of direction d: the second
// direction; with several heads all groups or none.
inline int reverse_from(const Layer& layer, Index d) {
  if (layer.maths.heads == 1) return 1;
  return d == 1 ? 0 : std::numeric_limits<int>::max();
}

// An array of all directions for the launch of direction d: the whole array, or, with several
// heads, the direction's part, divided into heads.
template <class Array>
Array groups_of(const Layer& layer, Index d, Array all) {
  if (layer.maths.heads == 1) return all;
  if (all.data) all.data += d * all.group;
  all.group = layer.H / layer.maths.heads;
  return all;
}
inline Index launches_of(const Layer& layer) {
  return layer.maths.heads == 1 ? 1 : layer.directions;
}

// ---- the two passes -----------------------------------------------------------------------------

template <class Cell, class S>
class PersistentForward : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C;

 public:
  // Lays the scratch out from `base`; from nothing, only measures it.
  PersistentForward(const Layer& layer, void* base)
      : layer_(layer), pairs_(layer.rows.pairs), gates_(K::gates * layer.H) {
    Arena arena(base);
    const Index D = layer.directions, row_bytes = layer.I * static_cast<Index>(sizeof(S));
    rows_.lay_out(layer, arena);
    h0_.lay_out(layer, layer.h0, arena);
    c0_.lay_out(layer, layer.c0, arena);
    weights_ = arena.take<S>(D * gates_ * layer.H / layer.maths.heads);
    bias_x_ = arena.take<C>(D * gates_);
    bias_h_ = arena.take<C>(D * gates_);
    const bool gathers = !uniform_rows(layer.input, layer.rows, layer.batch_sizes != nullptr,
                                       layer.I, input_stride_);
    if (gathers) block_ = least(pairs_, greatest(1, kProjectionBytes / greatest(1, row_bytes)));
    x_rows_ = arena.take<S>(block_ * layer.I);
    x_gates_ = arena.take<C>(D * pairs_ * gates_);
    workspace_ = arena.take<char>(static_cast<Index>(layer.plan->workspace_bytes));
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run() {
    rows_.prepare(layer_);
    h0_.prepare(layer_);
    c0_.prepare(layer_);
    pack_recurrent<Cell>(layer_, weights_);
    for (Index d = 0; d < layer_.directions; ++d) project(d);
    const Index D = layer_.directions;
    rows_.clear_padding(layer_, static_cast<S*>(layer_.output.data), D * layer_.H);
    if (layer_.cell.data)
      rows_.clear_padding(layer_, static_cast<C*>(layer_.cell.data), D * layer_.H);
    for (Index d = 0; d < launches_of(layer_); ++d)
      persistent::launch_forward(*layer_.plan, arrays(d), workspace_, stream());
  }

 private:
  void* stream() const { return layer_.tools.stream; }

  // Adds the product to the biases.
  void project(Index d) const {
    const Parameters& p = layer_.parameters[d];
    C *const bias = bias_x_ + d * gates_, *const to = x_gates_ + d * pairs_ * gates_;
    launch_elements(
        stream(),
        Biases<Cell, S>{
            {}, p.bias_ih, p.bias_hh, layer_.H, bias, bias_h_ + d * gates_, layer_.maths.heads});
    const bool biased = p.bias_ih.data || p.bias_hh.data;
    if (biased) launch_elements(stream(), RepeatRow<C>{bias, gates_, pairs_ * gates_, to});
    const Index block = x_rows_ ? block_ : pairs_;
    for (Index n = 0; n < pairs_; n += block)
      project_pairs<S>(layer_, d, n, least(block, pairs_ - n), gates_, input_stride_, x_rows_,
                       to + n * gates_, biased);
  }

  persistent::Forward<Stored<S>> arrays(Index d) const {
    using persistent::PlanesOf;
    const Index H = layer_.H, Hp = padded(H), units = H / layer_.maths.heads;
    const auto groups = [&](const auto& all) { return groups_of(layer_, d, all); };
    persistent::Forward<Stored<S>> a;
    a.steps = rows_.table(layer_);
    a.options = layer_.maths;
    a.reverse_from = reverse_from(layer_, d);
    a.aligned = units % (16 / static_cast<Index>(sizeof(S))) == 0;
    a.weight_hh = reinterpret_cast<const Stored<S>*>(weights_) + d * gates_ * units;
    a.hidden_bias = bias_h_ + d * gates_;
    a.x_gates = groups(PlanesOf<const float>{x_gates_, pairs_ * gates_, gates_, H});
    a.h0 = groups(h0_.get(layer_)), a.c0 = groups(c0_.get(layer_));
    a.hidden = groups(rows_.sequence<Stored<S>>(layer_.output, H));
    a.cell = groups(rows_.sequence<float>(layer_.cell, H));
    a.saved = groups(PlanesOf<float>{static_cast<float*>(layer_.saved), layer_.saved_group,
                                     Cell::saved * Hp, Hp});
    a.h_n = groups(written_state<S>(layer_, layer_.h_n));
    a.c_n = groups(written_state<S>(layer_, layer_.c_n));
    return a;
  }

  const Layer& layer_;
  const Index pairs_, gates_;
  PersistentRows rows_;
  PersistentState<S> h0_, c0_;
  Index input_stride_ = 0, block_ = 0;  // pairs packed at a time; zero: none
  S *weights_ = nullptr, *x_rows_ = nullptr;
  C *bias_x_ = nullptr, *bias_h_ = nullptr, *x_gates_ = nullptr;
  char* workspace_ = nullptr;
  std::size_t used_ = 0;
};

template <class Cell, class S>
class PersistentBackward : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C;

 public:
  // Lays the scratch out from `base`; from nothing, only measures it.
  PersistentBackward(const Layer& layer, void* base)
      : layer_(layer), pairs_(layer.rows.pairs), gradients_(layer) {
    Arena arena(base);
    const Index D = layer.directions, H = layer.H;
    rows_.lay_out(layer, arena);
    states_[0].lay_out(layer, layer.h0, arena);
    states_[1].lay_out(layer, layer.c0, arena);
    states_[2].lay_out(layer, layer.d_h_n, arena);
    states_[3].lay_out(layer, layer.d_c_n, arena);
    weights_ = arena.take<S>(D * K::gates * H * H / layer.maths.heads);
    const bool adds = layer.d_hidden.data || (layer.d_output.data && layer.d_output.unit != 1);
    d_outputs_ = arena.take<C>(adds ? pairs_ * D * H : 0);
    const bool copies = layer.d_cell.data && layer.d_cell.unit != 1;
    d_cells_ = arena.take<C>(copies ? pairs_ * D * H : 0);
    lay_out_gates(arena);
    workspace_ = arena.take<char>(static_cast<Index>(layer.plan->workspace_bytes));
    gradients_.lay_out(arena);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run() {
    const Index D = layer_.directions;
    rows_.prepare(layer_);
    for (const auto& state : states_) state.prepare(layer_);
    pack_recurrent<Cell>(layer_, weights_);
    if (d_outputs_) launch_elements(stream(), AddOutputGradients<S>{gradients_in(), d_outputs_});
    if (d_cells_)
      launch_elements(stream(),
                      CopySequence<C>{layer_.rows, layer_.d_cell, D * layer_.H, d_cells_});
    for (Index d = 0; d < D; ++d) rows_.clear_padding(layer_, d_gates_ + d * group_, width_);
    for (Index d = 0; d < launches_of(layer_); ++d)
      persistent::launch_backward(*layer_.plan, arrays(d), workspace_, stream());
    gradients_.run({d_gates_, group_, width_, plane_, nullptr});
  }

 private:
  void* stream() const { return layer_.tools.stream; }

  void lay_out_gates(Arena& arena) {
    const Index H = layer_.H, Hp = padded(H);
    if (std::is_same_v<S, C> && layer_.consume_saved) {
      group_ = layer_.saved_group, width_ = Cell::saved * Hp, plane_ = Hp;
      d_gates_ = static_cast<S*>(layer_.saved);
    } else {
      group_ = pairs_ * Cell::gradients * H, width_ = Cell::gradients * H, plane_ = H;
      d_gates_ = arena.take<S>(layer_.directions * group_);
    }
  }

  // The arrays that output_gradient() reads.
  BackwardData<S> gradients_in() const {
    BackwardData<S> a{};
    a.rows = layer_.rows, a.D = layer_.directions, a.O = layer_.O;
    a.d_output = layer_.d_output, a.d_hidden = layer_.d_hidden;
    a.d_above = static_cast<const C*>(layer_.d_above);
    return a;
  }

  persistent::Backward<Stored<S>> arrays(Index d) const {
    using persistent::PlanesOf;
    const Index H = layer_.H, Hp = padded(H), weights = K::gates * H * H / layer_.maths.heads;
    const auto groups = [&](const auto& all) { return groups_of(layer_, d, all); };
    persistent::Backward<Stored<S>> a;
    a.steps = rows_.table(layer_);
    a.options = layer_.maths;
    a.reverse_from = reverse_from(layer_, d);
    a.weight_hh = reinterpret_cast<const Stored<S>*>(weights_) + d * weights;
    a.hidden = groups(rows_.sequence<const Stored<S>>(layer_.output, H));
    a.cell = groups(rows_.sequence<const float>(layer_.cell, H));
    a.saved = groups(PlanesOf<const float>{static_cast<const float*>(layer_.saved),
                                           layer_.saved_group, Cell::saved * Hp, Hp});
    a.h0 = groups(states_[0].get(layer_)), a.c0 = groups(states_[1].get(layer_));
    a.d_h_n = groups(states_[2].get(layer_)), a.d_c_n = groups(states_[3].get(layer_));
    if (d_outputs_)
      a.d_above = groups(rows_.contiguous<const float>(layer_, d_outputs_));
    else if (layer_.d_above)
      a.d_above = groups(rows_.contiguous(layer_, static_cast<const float*>(layer_.d_above)));
    else
      a.d_output = groups(rows_.sequence<const Stored<S>>(layer_.d_output, H));
    a.d_cell = groups(d_cells_ ? rows_.contiguous<const float>(layer_, d_cells_)
                               : rows_.sequence<const float>(layer_.d_cell, H));
    a.d_gates =
        groups(PlanesOf<Stored<S>>{reinterpret_cast<Stored<S>*>(d_gates_), group_, width_, plane_});
    a.d_h0 = groups(written_state<S>(layer_, layer_.d_h0));
    a.d_c0 = groups(written_state<S>(layer_, layer_.d_c0));
    return a;
  }

  const Layer& layer_;
  const Index pairs_;
  Gradients<Cell, S, S> gradients_;
  PersistentRows rows_;
  PersistentState<S> states_[4];  // h0, c0, d_h_n, d_c_n
  S *weights_ = nullptr, *d_gates_ = nullptr;
  C *d_outputs_ = nullptr, *d_cells_ = nullptr;
  Index group_ = 0, width_ = 0, plane_ = 0;  // of d_gates
  char* workspace_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace fastrnn::cuda
