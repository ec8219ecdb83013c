// One layer forward.
//
// Maths          csrc/cells/. For each block of steps: first the projection x·W_ihᵀ as one matrix
//                product; then, step by step, h·W_hhᵀ is added and the cell applied, in one launch
//                for both directions (product.h), or, with many rows, with a product of the
//                library and one launch for the cells.
// Two products   reset-before GRU: r and z first, then n from r∘h. Projection (proj_size):
//                the hidden units first, then W_hr. Both need a second launch per step.
// Layouts        x_gates   [D][pairs of the block of steps][gates·H], compute type
//                h         [2][D][B][Op], storage: the state that enters a step, for every row: h
//                          of the previous step, h0, or zeros. A step reads one and writes the
//                          other
//                c         [D][B][H], the same for c, in place
//                second_operand [D][B][Hp], compute type: what a second product reads
//                weights   [D][first·H][Op], [D][(gates − first)·H or P][Hp], storage (product.h)
//                With several heads Op and Hp of W_hh's operands are wider, because each head's
//                units are stored separately (Heads), and the weights' rows are as long as one
//                head's.
//                saved     a row of planes·Hp for each pair: the cell's saved values, then, with
//                          projection, the hidden units before it
// Heads          blocks of the same launch, like the directions: a unit reads only its own head.
// Ownership      the thread that finishes element (d, i, u) of states, outputs and saved values.
// Cost           one or two launches per step, some 2–4 µs if the product is small; W_hh is read
//                from L2 for every tile of kTileRows rows.
#pragma once

#include <memory>
#include <utility>

#include "cell.h"
#include "layer.h"
#include "matrix.h"
#include "product.h"

namespace fastrnn::cuda {

// The bytes of gates in a block of steps that is projected at once, so that they stay in the L2.
#if !defined(FASTRNN_PROJECTION_BYTES)  // the tests use many small blocks
#define FASTRNN_PROJECTION_BYTES (Index{32} << 20)
#endif
inline constexpr Index kProjectionBytes = FASTRNN_PROJECTION_BYTES;

// Whether the library computes a step's product: from 32 rows on with tensor cores, from 64 without
// (estimates).
template <class S>
bool many_rows(const Layer& layer) {
  const bool tensor_cores = sizeof(S) == 2 || (sizeof(S) == 4 && layer.tools.allow_tf32);
  return layer.tools.library && layer.maths.heads == 1 && layer.rows.B >= (tensor_cores ? 32 : 64);
}

// The arrays that the kernels of a step read and write.
template <class S>
struct ForwardData {
  using C = typename ComputeOf<S>::type;
  Rows rows;
  CellOptions maths;
  Index s, D, H, O, P, Hp, Op;
  Heads units, outs;  // of the H hidden units, of the O units of h
  Index second_width;
  const S* weights;
  const S* second_weights;  // W_hr or W_hn
  const C* x_gates[2];
  Index x_first[2];          // the first pair of x_gates
  const C *bias_x, *bias_h;  // [D][gates·H]
  State h0, c0;
  const S* h;
  S* h_next;
  C *c, *second_operand;
  C* saved;  // null: not kept, or of one step, where a second product needs them
  Index saved_group, saved_width;
  bool one_step;  // saved holds one step
  Sequence output, cell;
  S *h_n, *c_n;

  FASTRNN_CELL Walk walk(Index d) const { return {rows, d == 1}; }
  FASTRNN_CELL Index state(Index d, Index i, Index width, Index u) const {
    return (d * rows.B + i) * width + u;
  }
  FASTRNN_CELL C* saved_row(Index d, Index t, Index i) const {
    if (one_step) return saved + (d * rows.B + i) * saved_width;
    return saved ? saved + d * saved_group + rows.pair(t, i) * saved_width : nullptr;
  }

  // Writes the state that enters the next step; `now` is this step's result if the row is active.
  template <class T>
  FASTRNN_CELL void pass_on(Index d, Index i, T now, T initial, T* to) const {
    if (s + 1 == rows.T) return;
    const Walk w = walk(d);
    const Entry entry = w.entry(w.step(s + 1), i);
    *to = entry == Entry::carried ? now : entry == Entry::initial ? initial : T{};
  }

  FASTRNN_CELL S initial_hidden(Index d, Index i, Index u) const {
    if (!h0.data) return S{};
    return static_cast<const S*>(h0.data)[d * h0.group + i * h0.row + u * h0.unit];
  }

  // Writes c to the array of all c, to c_n and to the next step; zeros for inactive rows.
  FASTRNN_CELL void finish_cell(Index d, Index t, Index i, Index u, C value, bool active) const {
    if (cell.data && (active || !rows.packed()))
      rows.at<C>(cell, t, i)[d * H + u] = active ? value : C(0);
    if (active && walk(d).last(t, i)) narrow(value, c_n + state(d, i, H, u));
    pass_on(d, i, value, state_value<S>(c0, d, i, u), c + state(d, i, H, u));
  }

  FASTRNN_CELL void finish_hidden(Index d, Index t, Index i, Index u, C value, bool active) const {
    S stored{};
    if (active) narrow(value, &stored);
    if (active || !rows.packed()) rows.at<S>(output, t, i)[d * O + u] = stored;
    if (active && walk(d).last(t, i)) h_n[state(d, i, O, u)] = stored;
    pass_on(d, i, stored, initial_hidden(d, i, u), h_next + state(d, i, Op, outs.at(u)));
  }
};

// The states that enter the first step; the final states of rows without a step.
template <class Cell, class S>
struct InitialStates {
  static constexpr const char* name = "initial states";
  using C = typename ComputeOf<S>::type;
  ForwardData<S> a;
  S* h;

  FASTRNN_CELL Index count() const { return a.D * a.rows.B * greatest(a.H, a.O); }
  FASTRNN_CELL void element(Index n) const {
    const Index width = greatest(a.H, a.O), u = n % width, i = n / width % a.rows.B;
    const Index d = n / width / a.rows.B;
    const Walk walk = a.walk(d);
    const bool initial = walk.entry(walk.step(0), i) == Entry::initial;
    const bool none = a.rows.length(i) == 0;
    if (u < a.O) {
      const S h0 = a.initial_hidden(d, i, u);
      h[a.state(d, i, a.Op, a.outs.at(u))] = initial ? h0 : S{};
      if (none) a.h_n[a.state(d, i, a.O, u)] = h0;
    }
    if constexpr (Cell::states > 1) {
      if (u >= a.H) return;
      const C c0 = state_value<S>(a.c0, d, i, u);
      a.c[a.state(d, i, a.H, u)] = initial ? c0 : C(0);
      if (none) narrow(c0, a.c_n + a.state(d, i, a.H, u));
    }
  }
};

// The product with h, then the cell or its first half.
template <class Cell, class S>
struct ForwardStep : DeviceCell<Cell, S> {
  static constexpr const char* name = "forward step";
  using K = DeviceCell<Cell, S>;
  using typename K::C, typename K::V;
  using Weight = S;
  using Operand = S;
  static constexpr int planes = K::first;
  ForwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.H; }
  FASTRNN_CELL Index depth() const { return a.outs.place; }
  FASTRNN_CELL bool runs(Index d, Index i) const { return a.rows.active(a.walk(d).step(a.s), i); }
  FASTRNN_CELL const S* weight(Index d, int gate, Index u) const {
    return a.weights + ((d * planes + gate) * a.H + u) * a.outs.place;
  }
  FASTRNN_CELL const S* operand(Index d, Index i, Index u) const {
    return a.h + a.state(d, i, a.Op, a.units.head(u) * a.outs.place);
  }

  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    const Index t = a.walk(d).step(a.s);
    const bool active = a.rows.active(t, i);
    if (active) return finish_active(d, t, i, u, sums);
    if constexpr (Cell::states > 1) a.finish_cell(d, t, i, u, C(0), false);
    if (!K::two_products && !a.P) a.finish_hidden(d, t, i, u, C(0), false);
  }

 private:
  FASTRNN_CELL void finish_active(Index d, Index t, Index i, Index u, const C* sums) const {
    V x[K::gates], sum[K::first], saved[Cell::saved], previous[2];
    const C* projected = a.x_gates[d] + (a.rows.pair(t, i) - a.x_first[d]) * K::gates * a.H + u;
    const Index bias = d * K::gates * a.H + u;
    FASTRNN_UNROLL
    for (int g = 0; g < K::gates; ++g) x[g] = V(projected[g * a.H]) + V(a.bias_x[bias + g * a.H]);
    FASTRNN_UNROLL
    for (int g = 0; g < K::first; ++g)
      sum[g] = V(sums[g]) + (K::separate(g) ? V(a.bias_h[bias + g * a.H]) : x[g]);
    previous[0] = a.P ? V(0) : V(widen(a.h[a.state(d, i, a.Op, a.outs.at(u))]));
    C* keep = a.saved_row(d, t, i);
    if constexpr (K::two_products) {
      Cell::forward_first(a.maths, sum, previous, saved);
      store_saved(keep, u, saved);
      a.second_operand[a.state(d, i, a.second_width, a.units.at(u))] = saved[Cell::operand].v;
    } else {
      V next[2];
      if constexpr (Cell::states > 1) previous[1] = V(a.c[a.state(d, i, a.H, u)]);
      Cell::forward(a.maths, x, sum, previous, next, saved);
      if (keep) store_saved(keep, u, saved);
      if constexpr (Cell::states > 1) a.finish_cell(d, t, i, u, next[1].v, true);
      if (!a.P) return a.finish_hidden(d, t, i, u, next[0].v, true);
      a.second_operand[a.state(d, i, a.second_width, u)] = next[0].v;
      if (keep) keep[Cell::saved * a.Hp + u] = next[0].v;
    }
  }

  FASTRNN_CELL void store_saved(C* keep, Index u, const V* saved) const {
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) keep[k * a.Hp + u] = saved[k].v;
  }
};

// Reset-before GRU: the gates that read r∘h.
template <class Cell, class S>
struct ForwardSecond : DeviceCell<Cell, S> {
  static constexpr const char* name = "forward step, second product";
  using K = DeviceCell<Cell, S>;
  using typename K::C, typename K::V;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = K::gates - K::first;
  ForwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.H; }
  FASTRNN_CELL Index depth() const { return a.units.place; }
  FASTRNN_CELL bool runs(Index d, Index i) const { return a.rows.active(a.walk(d).step(a.s), i); }
  FASTRNN_CELL const S* weight(Index d, int gate, Index u) const {
    return a.second_weights + ((d * planes + gate) * a.H + u) * a.units.place;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index u) const {
    return a.second_operand + a.state(d, i, a.second_width, a.units.head(u) * a.units.place);
  }

  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    const Index t = a.walk(d).step(a.s);
    if (!a.rows.active(t, i)) return a.finish_hidden(d, t, i, u, C(0), false);
    const C* projected = a.x_gates[d] + (a.rows.pair(t, i) - a.x_first[d]) * K::gates * a.H + u;
    V sum[planes], saved[Cell::saved], previous[1], next[1];
    FASTRNN_UNROLL
    for (int g = 0; g < planes; ++g)
      sum[g] = V(sums[g]) + V(projected[(K::first + g) * a.H]) +
               V(a.bias_x[(d * K::gates + K::first + g) * a.H + u]);
    C* keep = a.saved_row(d, t, i);
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) saved[k] = V(keep[k * a.Hp + u]);
    previous[0] = V(widen(a.h[a.state(d, i, a.Op, a.outs.at(u))]));
    Cell::forward_second(a.maths, sum, previous, next, saved);
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) keep[k * a.Hp + u] = saved[k].v;
    a.finish_hidden(d, t, i, u, next[0].v, true);
  }
};

// h = W_hr · hidden units.
template <class S>
struct ForwardProjection {
  static constexpr const char* name = "forward step, projection";
  using C = typename ComputeOf<S>::type;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = 1;
  ForwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.P; }
  FASTRNN_CELL Index depth() const { return a.Hp; }
  FASTRNN_CELL bool runs(Index d, Index i) const { return a.rows.active(a.walk(d).step(a.s), i); }
  FASTRNN_CELL const S* weight(Index d, int, Index u) const {
    return a.second_weights + (d * a.P + u) * a.Hp;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index) const {
    return a.second_operand + a.state(d, i, a.second_width, 0);
  }
  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    const Index t = a.walk(d).step(a.s);
    a.finish_hidden(d, t, i, u, sums[0], a.rows.active(t, i));
  }
};

// The biases in compute type: the input's, plus the state's where the products are not separate.
template <class Cell, class S>
struct Biases : DeviceCell<Cell, S> {
  static constexpr const char* name = "biases";
  using K = DeviceCell<Cell, S>;
  using typename K::C;
  Weight input, hidden;
  Index H;
  C *bias_x, *bias_h;
  Index heads = 1;  // bias_h: all gates of one head, then those of the next

  FASTRNN_CELL Index count() const { return K::gates * H; }
  FASTRNN_CELL void element(Index n) const {
    const C x = value(input, n), h = value(hidden, n);
    bias_x[n] = K::separate(static_cast<int>(n / H)) ? x : x + h;
    const Index own = H / heads, u = n % H;
    bias_h[heads == 1 ? n : (u / own * K::gates + n / H) * own + u % own] = h;
  }
  FASTRNN_CELL static C value(const Weight& w, Index n) {
    return w.data ? C(widen(static_cast<const S*>(w.data)[n * w.unit])) : C(0);
  }
};

// Rows of the input in sequence; zero where no row runs, independently of the input there.
template <class S>
struct GatherInput {
  static constexpr const char* name = "rows of the input";
  Rows rows;
  Sequence input;
  Index first, pairs, I;
  S* to;

  FASTRNN_CELL Index count() const { return pairs * I; }
  FASTRNN_CELL void element(Index n) const {
    Index t = 0, i = 0;
    rows.find(first + n / I, t, i);
    const bool active = rows.active(t, i);
    to[n] = active ? rows.at<const S>(input, t, i)[n % I * input.unit] : S{};
  }
};

// Whether the pairs of a sequence are the rows of a matrix in memory; sets their stride.
inline bool uniform_rows(const Sequence& a, const Rows& rows, bool packed, Index width,
                         Index& stride) {
  stride = packed || rows.B > 1 ? a.row : a.step;
  const bool regular = packed || rows.B <= 1 || rows.T == 1 || a.step == rows.B * a.row;
  return regular && (a.unit == 1 || width == 1) && stride >= width;
}

// Computes x·W_ihᵀ for `pairs` pairs of a direction from `first` on, and writes it to `gates`
// columns of `to`, or adds it. The input is read in place, in rows of `stride`, or first packed
// into `x_rows`.
template <class S>
void project_pairs(const Layer& layer, Index d, Index first, Index pairs, Index gates, Index stride,
                   S* x_rows, typename ComputeOf<S>::type* to, bool add) {
  const fastrnn::Weight& w = layer.parameters[d].weight_ih;
  const S* x = static_cast<const S*>(layer.input.data) + first * stride;
  if (x_rows) {
    launch_elements(layer.tools.stream,
                    GatherInput<S>{layer.rows, layer.input, first, pairs, layer.I, x_rows});
    x = x_rows;
  }
  multiply(layer.tools, Matrices<S>{pairs, gates, layer.I, x, x_rows ? layer.I : stride, 1,
                                    static_cast<const S*>(w.data), w.row, w.unit, to, gates, add});
}

template <class Cell, class S>
class Forward : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C;

 public:
  // Lays out the scratch from `base`; if that is null, only computes its size.
  Forward(const Layer& layer, void* base) : layer_(layer) {
    Arena arena(base);
    const Index D = layer.directions, B = layer.rows.B, H = layer.H;
    units_ = heads_of(H, layer.maths.heads), outs_ = heads_of(layer.O, layer.maths.heads);
    Hp_ = padded(H), Op_ = outs_.width();
    saved_width_ = (Cell::saved + (layer.P ? 1 : 0)) * Hp_;
    weights_ = arena.take<S>(D * K::first * H * outs_.place);
    second_rows_ = layer.P ? layer.P : (K::gates - K::first) * H;
    second_width_ = layer.P ? Hp_ : units_.width();
    second_depth_ = layer.P ? Hp_ : units_.place;
    second_weights_ = arena.take<S>(D * second_rows_ * second_depth_);
    bias_x_ = arena.take<C>(D * K::gates * H);
    bias_h_ = arena.take<C>(D * K::gates * H);
    h_ = arena.take<S>(2 * D * B * Op_);
    c_ = arena.take<C>(Cell::states > 1 ? D * B * H : 0);
    second_operand_ = arena.take<C>(second_rows_ ? D * B * second_width_ : 0);
    one_step_ = arena.take<C>(K::two_products && !layer.saved ? D * B * saved_width_ : 0);
    gathers_ = !uniform_rows(layer.input, layer.rows, packed(), layer.I, input_stride_);
    const Index gate_bytes = K::gates * H * static_cast<Index>(sizeof(C));
    const Index row_bytes = greatest(gate_bytes, gathers_ ? layer.I * sizeof(S) : 0);
    steps_ = least(layer.rows.T, greatest(1, kProjectionBytes / row_bytes / greatest(B, 1)));
    x_gates_ = arena.take<C>(D * steps_ * B * K::gates * H);
    x_rows_ = arena.take<S>(gathers_ ? steps_ * B * layer.I : 0);
    products_ = arena.take<C>(many_rows<S>(layer) ? D * B * K::first * H : 0);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run() {
    prepare();
    const std::unique_ptr<LibraryProduct> library = library_product();
    const Index T = layer_.rows.T;
    // The number of pairs before the next step; for the second direction, up to the next step.
    Index before[2] = {0, layer_.rows.pairs};
    for (Index s = 0; s < T;) {
      const Index end = least(s + steps_, T);
      for (Index d = 0; d < layer_.directions; ++d) project(d, s, end, before[d]);
      for (; s < end; ++s) step(s, library.get());
    }
  }

 private:
  bool packed() const { return layer_.batch_sizes != nullptr; }
  void* stream() const { return layer_.tools.stream; }

  void prepare() {
    const Index D = layer_.directions, B = layer_.rows.B;
    launch_elements(stream(), Fill<S>{h_, 2 * D * B * Op_});
    if (second_rows_) launch_elements(stream(), Fill<C>{second_operand_, D * B * second_width_});
    for (Index d = 0; d < D; ++d) pack(d);
    launch_elements(stream(), InitialStates<Cell, S>{data(0), h_});
  }

  void pack(Index d) {
    const Parameters& p = layer_.parameters[d];
    const Index H = layer_.H, first = K::first * H;
    const auto pack_gates = [&](int begin, Index rows, Index depth, S* to) {
      const fastrnn::Weight& w = p.weight_hh;
      const Index gate = units_.own * w.row;
      launch_elements(stream(),
                      PackWeights<S>{static_cast<const S*>(w.data) + begin * gate, w.row, w.unit,
                                     rows, outs_.own, depth, to, depth, units_, w.head, gate});
    };
    pack_gates(0, first, outs_.place, weights_ + d * first * outs_.place);
    S* second_weights = second_weights_ + d * second_rows_ * second_depth_;
    if (layer_.P)
      launch_elements(stream(), PackWeights<S>{static_cast<const S*>(p.weight_hr.data),
                                               p.weight_hr.row, p.weight_hr.unit, layer_.P, H,
                                               second_depth_, second_weights, second_depth_});
    else if (K::two_products)
      pack_gates(K::first, second_rows_, second_depth_, second_weights);
    const Index bias = d * K::gates * H;
    launch_elements(stream(),
                    Biases<Cell, S>{{}, p.bias_ih, p.bias_hh, H, bias_x_ + bias, bias_h_ + bias});
  }

  ForwardData<S> data(Index s) const {
    const Index D = layer_.directions, B = layer_.rows.B;
    ForwardData<S> a{};
    a.rows = layer_.rows, a.maths = layer_.maths;
    a.s = s, a.D = D, a.H = layer_.H, a.O = layer_.O, a.P = layer_.P, a.Hp = Hp_, a.Op = Op_;
    a.units = units_, a.outs = outs_, a.second_width = second_width_;
    a.weights = weights_, a.second_weights = second_weights_;
    for (Index d = 0; d < D; ++d) {
      a.x_gates[d] = x_gates_ + d * steps_ * B * K::gates * layer_.H;
      a.x_first[d] = x_first_[d];
    }
    a.bias_x = bias_x_, a.bias_h = bias_h_;
    a.h0 = layer_.h0, a.c0 = layer_.c0;
    a.h = h_ + (s % 2) * D * B * Op_, a.h_next = h_ + ((s + 1) % 2) * D * B * Op_;
    a.c = c_, a.second_operand = second_operand_;
    a.one_step = K::two_products && !layer_.saved;
    a.saved = a.one_step ? one_step_ : static_cast<C*>(layer_.saved);
    a.saved_group = layer_.saved_group, a.saved_width = saved_width_;
    a.output = layer_.output, a.cell = layer_.cell;
    a.h_n = static_cast<S*>(layer_.h_n), a.c_n = static_cast<S*>(layer_.c_n);
    return a;
  }

  // Projects the steps s … end − 1, and advances `before` by their pairs.
  void project(Index d, Index s, Index end, Index& before) {
    const Index T = layer_.rows.T, B = layer_.rows.B, gates = K::gates * layer_.H;
    Index pairs = 0;
    for (Index k = s; k < end; ++k) pairs += packed() ? layer_.batch_sizes[d ? T - 1 - k : k] : B;
    const Index first = d ? before - pairs : before;
    before = d ? first : first + pairs;
    x_first_[d] = first;
    project_pairs<S>(layer_, d, first, pairs, gates, input_stride_, x_rows_,
                     x_gates_ + d * steps_ * B * gates, false);
  }

  // With many rows: the product of a step with h, prepared once.
  std::unique_ptr<LibraryProduct> library_product() const {
    if (!many_rows<S>(layer_)) return nullptr;
    auto product = std::make_unique<LibraryProduct>(layer_.tools, any(step_product()));
    return product->usable() ? std::move(product) : nullptr;
  }
  Matrices<S> step_product() const {
    const Index first = K::first * layer_.H;
    return {layer_.rows.B, first, Op_, h_, Op_, 1, weights_, Op_, 1, products_, first, false};
  }

  void step(Index s, const LibraryProduct* library) {
    const ForwardData<S> a = data(s);
    const ForwardStep<Cell, S> first{{}, a};
    if (library) {
      const Matrices<S> p = step_product();
      for (Index d = 0; d < layer_.directions; ++d)
        library->run(a.h + d * p.m * Op_, weights_ + d * p.n * Op_, products_ + d * p.m * p.n);
      launch_finish(stream(), first, products_, layer_.H);
    } else {
      launch_product(stream(), first);
    }
    if constexpr (K::two_products)
      launch_product(stream(), ForwardSecond<Cell, S>{{}, a});
    else if (Cell::projects && layer_.P)
      launch_product(stream(), ForwardProjection<S>{a});
  }

  const Layer& layer_;
  Heads units_, outs_;
  Index Hp_ = 0, Op_ = 0, saved_width_ = 0, steps_ = 0, input_stride_ = 0;
  Index second_rows_ = 0, second_width_ = 0, second_depth_ = 0;
  bool gathers_ = false;
  S *weights_ = nullptr, *second_weights_ = nullptr, *h_ = nullptr, *x_rows_ = nullptr;
  C *bias_x_ = nullptr, *bias_h_ = nullptr, *c_ = nullptr, *second_operand_ = nullptr;
  C *one_step_ = nullptr, *x_gates_ = nullptr, *products_ = nullptr;
  Index x_first_[2] = {};
  std::size_t used_ = 0;
};

}  // namespace fastrnn::cuda
