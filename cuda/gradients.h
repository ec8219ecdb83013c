// The gradients without a recurrence: of the weights and of the input.
//
// Maths       sums over all pairs n of step and row, where da are the gates' gradients:
//               dW_ih = Σ_n da_n·x_nᵀ   dW_hh = Σ_n da_n·h_{n−1}ᵀ   dW_hr = Σ_n dh_n·hidden_nᵀ
//               db = Σ_n da_n           dx_n = Σ_gates W_ihᵀ·da_n, of both directions
//             as matrix products (matrix.h) over blocks of pairs, accumulated block by block.
// Operands    in storage type, for the library: da of half types is rounded to it here, unless a
//             persistent kernel has done so. Operands that are the rows of a matrix in memory are
//             read in place; the others are packed for each block of pairs. A row that does not
//             run has da = 0, and zeros replace its x, h and hidden units, independently of the
//             content of its memory.
// Layouts     packed  [pairs of the block][columns], storage
//             sums    for half types: each gradient of a weight, compute type
// Heads       each head's dW_hh from its own da and h, all as one batched product.
// Cost        G·H·(I + O) products per pair, for weights and for input each, on tensor cores if
//             the library uses them; packing reads and writes its data once.
#pragma once

#include <type_traits>

#include "forward.h"

namespace fastrnn::cuda {

// The bytes of a block of packed pairs.
inline constexpr Index kGradientBytes = 2 * kProjectionBytes;

// Rows of gates·H: to[n − first][g·H + u] = plane (code >> 4·g) & 15 of the gates' gradients; with
// several heads all gates of one head, then those of the next.
template <class S, class G>
struct GatherGates {
  static constexpr const char* name = "rows of the gates' gradients";
  const G* d_gates;
  Index width, plane, H, gates, first, pairs;
  unsigned code;
  S* to;
  Index heads = 1;

  FASTRNN_CELL Index count() const { return pairs * gates * H; }
  FASTRNN_CELL void element(Index n) const {
    const Index own = H / heads, g = n / own % gates, pair = first + n / H / gates;
    const Index u = heads == 1 ? n % H : n % (gates * H) / (gates * own) * own + n % own;
    narrow(widen(d_gates[pair * width + ((code >> (4 * g)) & 15) * plane + u]), to + n);
  }
};

// Rows of some columns of each pair's saved values; zeros where no row runs.
template <class S>
struct GatherKept {
  static constexpr const char* name = "rows of saved values";
  using C = typename ComputeOf<S>::type;
  Rows rows;
  const C* from;
  Index width, columns, first, pairs;
  S* to;

  FASTRNN_CELL Index count() const { return pairs * columns; }
  FASTRNN_CELL void element(Index n) const {
    const Index pair = first + n / columns;
    Index t = 0, i = 0;
    rows.find(pair, t, i);
    narrow(rows.active(t, i) ? from[pair * width + n % columns] : C(0), to + n);
  }
};

// Rows of h before the step of each pair.
template <class S>
struct GatherHidden {
  static constexpr const char* name = "rows of h before each step";
  Rows rows;
  Sequence output;
  State h0;
  Index d, O, first, pairs;
  S* to;

  FASTRNN_CELL Index count() const { return pairs * O; }
  FASTRNN_CELL void element(Index n) const {
    Index t = 0, i = 0;
    rows.find(first + n / O, t, i);
    const Index u = n % O;
    const Walk walk{rows, d == 1};
    const Entry entry = walk.entry(t, i);
    S h{};
    if (entry == Entry::carried)
      h = rows.at<const S>(output, walk.previous(t), i)[d * O + u];
    else if (entry == Entry::initial && h0.data)
      h = static_cast<const S*>(h0.data)[d * h0.group + i * h0.row + u * h0.unit];
    to[n] = h;
  }
};

template <class S>
struct Narrow {
  static constexpr const char* name = "rounding to storage";
  using C = typename ComputeOf<S>::type;
  const C* from;
  Index size;
  S* to;

  FASTRNN_CELL Index count() const { return size; }
  FASTRNN_CELL void element(Index n) const { narrow(from[n], to + n); }
};

// Gradients of biases: sums of the columns of the gates' gradients over all pairs, in runs; each
// warp of the block sums every kWarps-th pair.
template <class S, class G>
struct ColumnSums {
  static constexpr const char* name = "gradients of biases";
  static constexpr int phases = 2;
  using C = typename ComputeOf<S>::type;
  struct Shared {
    C part[kWarps][kWarp];
  };
  using Registers = Nothing;
  const G* d_gates;
  Index width, plane, H, gates, pairs;
  unsigned code;
  S *to, *also_to;  // the second may be null

  Index blocks() const { return ceil_div(gates * H, kWarp); }
  FASTRNN_CELL Index rounds() const { return 1; }

  template <int phase>
  FASTRNN_CELL void run(Index block, int thread, Index, Shared& shared, Registers&) const {
    const int warp = thread / kWarp, lane = thread % kWarp;
    const Index column = block * kWarp + lane;
    if (column >= gates * H) return;
    if constexpr (phase == 0) {
      const Index from = (code >> (4 * (column / H))) & 15;
      shared.part[warp][lane] = sum(d_gates + from * plane + column % H, warp);
    } else if (warp == 0) {
      C total = shared.part[0][lane];
      for (int w = 1; w < kWarps; ++w) total += shared.part[w][lane];
      narrow(total, to + column);
      if (also_to) narrow(total, also_to + column);
    }
  }

 private:
  FASTRNN_CELL C sum(const G* from, int warp) const {
    constexpr Index run = 64 * kWarps;
    C total = 0;
    for (Index n0 = 0; n0 < pairs; n0 += run) {
      C part = 0;
      for (Index n = n0 + warp; n < least(n0 + run, pairs); n += kWarps)
        part += widen(from[n * width]);
      total += part;
    }
    return total;
  }
};

// `G`: the type in which the gates' gradients are stored.
template <class Cell, class S, class G>
class Gradients : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C;
  static constexpr bool half = sizeof(S) != sizeof(C);

 public:
  // The gates' gradients, [D][pairs][width], with gradient k of unit u at k·plane + u; and dh of a
  // projected state.
  struct Data {
    const G* d_gates;
    Index group, width, plane;
    const C* d_proj;
  };

  explicit Gradients(const Layer& layer)
      : layer_(layer),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        rows_(K::gates * layer.H),
        recurrent_(rows_ * layer.O / layer.maths.heads) {
    // The padding of the caller's input may contain anything.
    const bool dirty = layer.rows.lengths && !layer.d_below;
    gathers_input_ = dirty || !uniform_rows(layer.input, layer.rows, layer.batch_sizes != nullptr,
                                            layer.I, input_stride_);
  }

  void lay_out(Arena& arena) {
    const Index H = layer_.H, I = layer_.I, O = layer_.O, P = layer_.P, D = layer_.directions;
    const bool more = P || K::two_products;
    const Index packed_columns =
        2 * rows_ + (gathers_input_ ? I : 0) + O + (more ? H : 0) + (P ? P : 0);
    const Index bytes = packed_columns * static_cast<Index>(sizeof(S)) +
                        (half && layer_.d_input ? I * static_cast<Index>(sizeof(C)) : 0);
    block_ = least(layer_.rows.pairs, greatest(1, kGradientBytes / bytes));
    input_gates_ = arena.take<S>(block_ * rows_);
    hidden_gates_ = arena.take<S>(block_ * rows_);
    inputs_ = arena.take<S>(gathers_input_ ? block_ * I : 0);
    hidden_ = arena.take<S>(block_ * O);
    kept_ = arena.take<S>(more ? block_ * H : 0);
    projected_ = arena.take<S>(P ? block_ * P : 0);
    d_inputs_ = arena.take<C>(half && layer_.d_input ? block_ * I : 0);
    for (Index d = 0; half && d < D; ++d)
      sums_[d] = {arena.take<C>(rows_ * I), arena.take<C>(recurrent_), arena.take<C>(P * H)};
  }

  void run(const Data& data) {
    data_ = data;
    const Index pairs = layer_.rows.pairs;
    if (pairs == 0) return clear();
    for (Index n0 = 0; n0 < pairs; n0 += block_) {
      const Index count = least(block_, pairs - n0);
      for (Index d = 0; d < layer_.directions; ++d) add_block(d, n0, count);
      if (half && layer_.d_input)
        launch_elements(stream(), Narrow<S>{d_inputs_, count * layer_.I,
                                            static_cast<S*>(layer_.d_input) + n0 * layer_.I});
    }
    for (Index d = 0; d < layer_.directions && layer_.d_parameters; ++d) {
      if (half) narrow_sums(d);
      biases(d);
    }
  }

 private:
  struct Sums {
    C *weight_ih, *weight_hh, *weight_hr;
  };
  struct MatrixRows {
    const S* data;
    Index stride;
  };

  void* stream() const { return layer_.tools.stream; }
  const Parameters wanted(Index d) const {
    return layer_.d_parameters ? layer_.d_parameters[d] : Parameters{};
  }
  // Where a weight's gradient is accumulated: in the gradient itself, or in `beside`.
  C* sums(const fastrnn::Weight& to, C* beside) const {
    if (!to.data) return nullptr;
    if constexpr (half)
      return beside;
    else
      return static_cast<C*>(to.data);
  }

  void add_block(Index d, Index n0, Index count) {
    const Parameters to = wanted(d);
    const Index H = layer_.H, I = layer_.I, O = layer_.O;
    const MatrixRows input_gates = gates_rows(d, n0, count, K::input_code, 1, input_gates_);
    if (C* sum = sums(to.weight_ih, sums_[d].weight_ih))
      add_weights(1, rows_, I, count, input_gates, input_rows(d, n0, count), sum, n0 > 0);
    if (C* sum = sums(to.weight_hh, sums_[d].weight_hh)) {
      const Index heads = layer_.maths.heads, units = H / heads, outs = O / heads;
      const MatrixRows gates = K::hidden_code == K::input_code && heads == 1
                                   ? input_gates
                                   : gates_rows(d, n0, count, K::hidden_code, heads, hidden_gates_);
      launch_elements(stream(), GatherHidden<S>{layer_.rows, layer_.output, layer_.h0, d, O, n0,
                                                count, hidden_});
      add_weights(heads, K::first * units, outs, count, gates, {hidden_, O}, sum, n0 > 0);
      if constexpr (K::two_products)
        add_weights(heads, (K::gates - K::first) * units, units, count,
                    {gates.data + K::first * units, gates.stride},
                    kept_rows(d, n0, count, Cell::operand), sum + K::first * units * outs, n0 > 0);
    }
    if (C* sum = layer_.P ? sums(to.weight_hr, sums_[d].weight_hr) : nullptr)
      add_weights(1, O, H, count, projected_rows(d, n0, count),
                  kept_rows(d, n0, count, Cell::saved), sum, n0 > 0);
    if (C* const dx = input_gradient(n0)) {
      const fastrnn::Weight& w = layer_.parameters[d].weight_ih;
      multiply(layer_.tools,
               Matrices<S>{count, I, rows_, input_gates.data, input_gates.stride, 1,
                           static_cast<const S*>(w.data), w.unit, w.row, dx, I, d > 0});
    }
  }

  C* input_gradient(Index n0) const {
    if (layer_.d_below) return static_cast<C*>(layer_.d_below) + n0 * layer_.I;
    if (!layer_.d_input) return nullptr;
    if constexpr (half)
      return d_inputs_;
    else
      return static_cast<C*>(layer_.d_input) + n0 * layer_.I;
  }

  // sum[m][n] (+)= Σ over the pairs of left[m]·right[n]; `heads` of these products, each with its
  // own columns of left and right.
  void add_weights(Index heads, Index m, Index n, Index pairs, const MatrixRows& left,
                   const MatrixRows& right, C* sum, bool add) const {
    const Index gates = rows_ / heads;
    multiply(layer_.tools, Matrices<S>{m, n, pairs, left.data, 1, left.stride, right.data, 1,
                                       right.stride, sum, n, add, heads, gates, n, gates * n});
  }

  // Whether the gates' gradients are the rows of a matrix in memory.
  bool reads_gates(unsigned code) const {
    bool regular = std::is_same_v<S, G> && layer_.H == data_.plane;
    for (int g = 0; g < K::gates; ++g)
      regular = regular && ((code >> (4 * g)) & 15) == (code & 15) + static_cast<unsigned>(g);
    return regular;
  }

  MatrixRows gates_rows(Index d, Index n0, Index count, unsigned code, Index heads, S* to) const {
    const G* from = data_.d_gates + d * data_.group;
    if constexpr (std::is_same_v<S, G>)
      if (heads == 1 && reads_gates(code))
        return {from + n0 * data_.width + (code & 15) * data_.plane, data_.width};
    launch_elements(stream(), GatherGates<S, G>{from, data_.width, data_.plane, layer_.H, K::gates,
                                                n0, count, code, to, heads});
    return {to, rows_};
  }

  // Packed with the first direction, for both.
  MatrixRows input_rows(Index d, Index n0, Index count) const {
    if (!gathers_input_)
      return {static_cast<const S*>(layer_.input.data) + n0 * input_stride_, input_stride_};
    if (d == 0 || !wanted(0).weight_ih.data)
      launch_elements(stream(),
                      GatherInput<S>{layer_.rows, layer_.input, n0, count, layer_.I, inputs_});
    return {inputs_, layer_.I};
  }

  MatrixRows kept_rows(Index d, Index n0, Index count, int plane) const {
    const Index width = (Cell::saved + (layer_.P ? 1 : 0)) * Hp_;
    const C* from = static_cast<const C*>(layer_.saved) + d * layer_.saved_group + plane * Hp_;
    launch_elements(stream(), GatherKept<S>{layer_.rows, from, width, layer_.H, n0, count, kept_});
    return {kept_, layer_.H};
  }

  MatrixRows projected_rows(Index d, Index n0, Index count) const {
    const C* from = data_.d_proj + d * layer_.rows.pairs * Op_;
    launch_elements(stream(),
                    GatherKept<S>{layer_.rows, from, Op_, layer_.O, n0, count, projected_});
    return {projected_, layer_.O};
  }

  void narrow_sums(Index d) const {
    const Parameters to = wanted(d);
    const auto one = [&](const fastrnn::Weight& w, const C* from, Index size) {
      if (w.data) launch_elements(stream(), Narrow<S>{from, size, static_cast<S*>(w.data)});
    };
    one(to.weight_ih, sums_[d].weight_ih, rows_ * layer_.I);
    one(to.weight_hh, sums_[d].weight_hh, recurrent_);
    if (layer_.P) one(to.weight_hr, sums_[d].weight_hr, layer_.P * layer_.H);
  }

  void biases(Index d) const {
    const Parameters to = wanted(d);
    S *input = static_cast<S*>(to.bias_ih.data), *hidden = static_cast<S*>(to.bias_hh.data);
    const auto sum = [&](unsigned code, S* one, S* other) {
      launch(stream(), ColumnSums<S, G>{data_.d_gates + d * data_.group, data_.width, data_.plane,
                                        layer_.H, K::gates, layer_.rows.pairs, code, one, other});
    };
    if (K::input_code == K::hidden_code && input) return sum(K::input_code, input, hidden);
    if (input) sum(K::input_code, input, nullptr);
    if (hidden) sum(K::hidden_code, hidden, nullptr);
  }

  // Without pairs every gradient of a weight is zero.
  void clear() const {
    const auto one = [&](const fastrnn::Weight& w, Index size) {
      if (w.data) launch_elements(stream(), Fill<S>{static_cast<S*>(w.data), size});
    };
    for (Index d = 0; d < layer_.directions; ++d) {
      const Parameters to = wanted(d);
      one(to.weight_ih, rows_ * layer_.I);
      one(to.weight_hh, recurrent_);
      one(to.bias_ih, rows_);
      one(to.bias_hh, rows_);
      one(to.weight_hr, layer_.P * layer_.H);
    }
  }

  const Layer& layer_;
  Data data_{};
  const Index Hp_, Op_, rows_, recurrent_;  // recurrent_: elements of a weight_hh
  Index block_ = 0, input_stride_ = 0;
  bool gathers_input_ = false;
  S *input_gates_ = nullptr, *hidden_gates_ = nullptr, *inputs_ = nullptr, *hidden_ = nullptr;
  S *kept_ = nullptr, *projected_ = nullptr;
  C* d_inputs_ = nullptr;
  Sums sums_[2] = {};
};

}  // namespace fastrnn::cuda
