// One layer backward through time.
//
// Maths          csrc/cells/. The steps run in the reverse of forward's order. At each step the
//                gradient of h is the gradient of the output, plus the gradients of the next step's
//                gates through W_hhᵀ, plus what the cell carries past the product (a GRU's dh·z):
//                  dh_t = dy_t + Σ_gates da_{t+1}·W_hh + carried
//                One launch: the product (product.h) and the cell's backward. It writes only the
//                gates' gradients; the gradients of weights and input are matrix products over all
//                pairs afterwards (gradients.h).
// Two products   reset-before GRU: dn from dh, then d(r∘h) = dn·W_hn, then dr. Projection: dh of
//                size P first, then W_hrᵀ to the hidden units. Both are a second launch.
// Layouts        d_gates   [D][pairs][width]: planes of Hp as the cell's input_gradient and
//                          hidden_gradient say, zero beyond H and where a row does not run; in the
//                          place of forward's saved values where the caller gives these up
//                d_proj    [D][pairs][Op], dh of a projected state, zero likewise
//                carried   [D][B][O], d_c [D][B][H], compute type
//                weights   [D][O][(high − low)·Hp]: column u of W_hh, gate planes after each other;
//                second_weights [D][H][(gates − first)·Hp or Op]: of W_hn or W_hr, likewise
//                of several heads both are only as long as one head's planes
//                by_head   [2][D][B][head][gradient][Hp of a head], of several heads: d_gates of a
//                          step once more, a head's side by side for the product. A step reads one
//                          and writes the other
// Ownership      element (d, i, u) of everything: the thread that finishes it.
// Cost           as forward: a launch or two each step.
#pragma once

#include "forward.h"
#include "gradients.h"

namespace fastrnn::cuda {

// The arrays that the kernels of a step read and write.
template <class S>
struct BackwardData {
  using C = typename ComputeOf<S>::type;
  Rows rows;
  CellOptions maths;
  Index s, D, H, O, P, Hp, Op;
  const C* saved;
  Index saved_group, saved_width;
  C* d_gates;
  Index d_gates_group, width;
  const C* zeros;  // a row of d_gates or d_proj
  const S* weights;
  Index depth;
  const S* second_weights;  // W_hr or W_hn
  Index second_depth;
  Heads units, outs;           // of the H hidden units, of the O units of h
  C *by_head, *by_head_after;  // of this step, and of step t+1; null: one head
  Index by_head_width;
  S* narrow_gates;  // [D][B][depth]: this step's, for the library; null: not needed
  Sequence output, cell;
  State h0, c0;
  Sequence d_output, d_hidden, d_cell;
  const C* d_above;
  State d_h_n, d_c_n;
  C *d_c, *carried, *d_proj;
  S *d_h0, *d_c0;

  FASTRNN_CELL Walk walk(Index d) const { return {rows, d == 1}; }
  FASTRNN_CELL Index state(Index d, Index i, Index width_, Index u) const {
    return (d * rows.B + i) * width_ + u;
  }
  FASTRNN_CELL C* gates_row(Index d, Index n) const {
    return d_gates + d * d_gates_group + n * width;
  }
  // The location of a gradient in by_head.
  FASTRNN_CELL C* headed(C* step, Index d, Index i, Index gradients, Index plane, Index u) const {
    return step + state(d, i, by_head_width,
                        (units.head(u) * gradients + plane) * units.place + u % units.own);
  }
  FASTRNN_CELL C* projected_row(Index d, Index n) const {
    return d_proj + (d * rows.pairs + n) * Op;
  }
  FASTRNN_CELL const C* saved_row(Index d, Index n) const {
    return saved + d * saved_group + n * saved_width;
  }

  // dy of a pair: from the layer above or the caller, plus the caller's gradient of all h.
  FASTRNN_CELL C output_gradient(Index d, Index t, Index i, Index u) const {
    C dy = 0;
    const Index column = d * O + u;
    if (d_above)
      dy = d_above[rows.pair(t, i) * D * O + column];
    else if (d_output.data)
      dy = widen(rows.at<const S>(d_output, t, i)[column * d_output.unit]);
    if (d_hidden.data) dy += widen(rows.at<const S>(d_hidden, t, i)[column * d_hidden.unit]);
    return dy;
  }

  // The whole gradient of h: the contribution of step t+1, summed, plus dy. With this order a
  // sequence that is split in two, where d_h_n is the second part's d_h0, rounds identically.
  FASTRNN_CELL C hidden_gradient(Index d, Index t, Index i, Index u, C product,
                                 bool carries) const {
    const Walk w = walk(d);
    C dh = 0;
    if (w.last(t, i))
      dh = state_value<S>(d_h_n, d, i, u);
    else if (!w.cut_after(t, i))
      dh = carries ? product + carried[state(d, i, O, u)] : product;
    return dh + output_gradient(d, t, i, u);
  }

  // h and c before a pair's step.
  FASTRNN_CELL C previous_hidden(Index d, Index t, Index i, Index u) const {
    const Walk w = walk(d);
    const Entry entry = w.entry(t, i);
    if (entry == Entry::initial) return state_value<S>(h0, d, i, u);
    if (entry != Entry::carried) return 0;
    return widen(rows.at<const S>(output, w.previous(t), i)[d * O + u]);
  }
  FASTRNN_CELL C previous_cell(Index d, Index t, Index i, Index u) const {
    const Walk w = walk(d);
    const Entry entry = w.entry(t, i);
    if (entry == Entry::initial) return state_value<S>(c0, d, i, u);
    if (entry != Entry::carried) return 0;
    return rows.at<const C>(cell, w.previous(t), i)[d * H + u];
  }
};

// The cell's backward on one hidden unit, or the half of it that needs only dh.
template <class Cell, class S>
struct CellBackward : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C, typename K::V;

  // `dh`: the whole gradient of h.
  static FASTRNN_CELL void run(const BackwardData<S>& a, Index d, Index t, Index i, Index u, C dh) {
    const Walk walk = a.walk(d);
    const Index n = a.rows.pair(t, i);
    const C* keep = a.saved_row(d, n) + u;
    V saved[Cell::saved], previous[2], next[2], d_next[2], d_previous[2], d_a[Cell::gradients];
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) saved[k] = V(keep[k * a.Hp]);
    if constexpr (Cell::carries) previous[0] = V(a.previous_hidden(d, t, i, u));
    d_next[0] = V(dh);
    const Index unit = a.state(d, i, a.H, u);
    if constexpr (Cell::states > 1) {
      previous[1] = V(a.previous_cell(d, t, i, u));
      next[1] = V(a.rows.template at<const C>(a.cell, t, i)[d * a.H + u]);
      const bool last = walk.last(t, i);
      d_next[1] = V(last                   ? state_value<S>(a.d_c_n, d, i, u)
                    : walk.cut_after(t, i) ? C(0)
                                           : a.d_c[unit]);
      if (a.d_cell.data)
        d_next[1] = d_next[1] +
                    V(a.rows.template at<const C>(a.d_cell, t, i)[(d * a.H + u) * a.d_cell.unit]);
    }
    if constexpr (K::two_products) {
      Cell::backward_second(a.maths, saved, previous, d_next, d_previous, d_a);
      FASTRNN_UNROLL
      for (int g = 1; g < K::gates; ++g) {
        const int plane = K::hidden_plane(g);
        store(a, d, n, i, u, plane, d_a[plane]);
      }
    } else {
      Cell::backward(a.maths, saved, previous, next, d_next, d_previous, d_a);
      FASTRNN_UNROLL
      for (int p = 0; p < Cell::gradients; ++p) store(a, d, n, i, u, p, d_a[p]);
    }
    if constexpr (Cell::carries) a.carried[a.state(d, i, a.O, u)] = d_previous[0].v;
    if constexpr (Cell::states > 1) a.d_c[unit] = d_previous[1].v;
  }

  static FASTRNN_CELL void store(const BackwardData<S>& a, Index d, Index n, Index i, Index u,
                                 int plane, V value) {
    a.gates_row(d, n)[plane * a.Hp + u] = value.v;
    if (a.narrow_gates && plane >= K::low && plane < K::high)
      narrow(value.v, a.narrow_gates + a.state(d, i, a.depth, (plane - K::low) * a.Hp + u));
    if (a.by_head && u < a.H) *a.headed(a.by_head, d, i, Cell::gradients, plane, u) = value.v;
  }

  // Writes zeros, beyond the last unit and for a row that does not run.
  static FASTRNN_CELL void clear(const BackwardData<S>& a, Index d, Index t, Index i, Index u) {
    if (a.rows.packed() && !a.rows.active(t, i)) return;
    FASTRNN_UNROLL
    for (int p = 0; p < Cell::gradients; ++p) store(a, d, a.rows.pair(t, i), i, u, p, V(0));
  }
};

// One step: the contribution of step t+1, and the cell.
template <class Cell, class S>
struct BackwardStep : DeviceCell<Cell, S> {
  static constexpr const char* name = "backward step";
  using K = DeviceCell<Cell, S>;
  using typename K::C;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = 1;
  BackwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.P ? a.Op : a.Hp; }
  FASTRNN_CELL Index depth() const { return a.depth; }
  FASTRNN_CELL bool runs(Index d, Index i) const {
    const Index t = a.walk(d).step(a.s);
    return a.rows.active(t, i) && !a.walk(d).cut_after(t, i);
  }
  FASTRNN_CELL const S* weight(Index d, int, Index u) const {
    return a.weights + (d * a.O + least(u, a.O - 1)) * a.depth;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index u) const {
    if (!runs(d, i)) return a.zeros;
    if (a.by_head)
      return a.headed(a.by_head_after, d, i, Cell::gradients, K::low,
                      a.units.own * a.outs.head(least(u, a.O - 1)));
    const Walk walk = a.walk(d);
    return a.gates_row(d, a.rows.pair(walk.following(walk.step(a.s)), i)) + K::low * a.Hp;
  }

  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    const Index t = a.walk(d).step(a.s);
    const bool runs_here = a.rows.active(t, i) && u < a.O;
    if (a.P) {
      if (a.rows.packed() && !a.rows.active(t, i)) return;
      a.projected_row(d, a.rows.pair(t, i))[u] =
          runs_here ? a.hidden_gradient(d, t, i, u, sums[0], false) : C(0);
    } else if (runs_here) {
      const C dh = a.hidden_gradient(d, t, i, u, sums[0], Cell::carries);
      CellBackward<Cell, S>::run(a, d, t, i, u, dh);
    } else {
      CellBackward<Cell, S>::clear(a, d, t, i, u);
    }
  }
};

// With projection: computes dh of the hidden units, then the cell.
template <class Cell, class S>
struct BackwardProjection : DeviceCell<Cell, S> {
  static constexpr const char* name = "backward step, projection";
  using K = DeviceCell<Cell, S>;
  using typename K::C;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = 1;
  BackwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.Hp; }
  FASTRNN_CELL Index depth() const { return a.second_depth; }
  FASTRNN_CELL bool runs(Index d, Index i) const { return a.rows.active(a.walk(d).step(a.s), i); }
  FASTRNN_CELL const S* weight(Index d, int, Index u) const {
    return a.second_weights + (d * a.H + least(u, a.H - 1)) * a.second_depth;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index) const {
    return runs(d, i) ? a.projected_row(d, a.rows.pair(a.walk(d).step(a.s), i)) : a.zeros;
  }
  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    const Index t = a.walk(d).step(a.s);
    if (a.rows.active(t, i) && u < a.H)
      CellBackward<Cell, S>::run(a, d, t, i, u, sums[0]);
    else
      CellBackward<Cell, S>::clear(a, d, t, i, u);
  }
};

// Reset-before GRU: d(r∘h) = dn·W_hn, then the gradients that depend on it.
template <class Cell, class S>
struct BackwardSecond : DeviceCell<Cell, S> {
  static constexpr const char* name = "backward step, second product";
  using K = DeviceCell<Cell, S>;
  using typename K::C, typename K::V;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = 1;
  BackwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.H; }
  FASTRNN_CELL Index depth() const { return a.second_depth; }
  FASTRNN_CELL bool runs(Index d, Index i) const { return a.rows.active(a.walk(d).step(a.s), i); }
  FASTRNN_CELL const S* weight(Index d, int, Index u) const {
    return a.second_weights + (d * a.H + u) * a.second_depth;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index u) const {
    if (!runs(d, i)) return a.zeros;
    constexpr int plane = Cell::hidden_gradient[K::first];
    if (a.by_head)
      return a.headed(a.by_head, d, i, Cell::gradients, plane, a.units.own * a.units.head(u));
    const Index n = a.rows.pair(a.walk(d).step(a.s), i);
    return a.gates_row(d, n) + plane * a.Hp;
  }
  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    if (!runs(d, i)) return;
    const Index t = a.walk(d).step(a.s), n = a.rows.pair(t, i);
    const C* keep = a.saved_row(d, n) + u;
    C* carried = a.carried + a.state(d, i, a.O, u);
    V saved[Cell::saved], d_a[Cell::gradients];
    FASTRNN_UNROLL
    for (int k = 0; k < Cell::saved; ++k) saved[k] = V(keep[k * a.Hp]);
    const V previous[1] = {V(a.previous_hidden(d, t, i, u))}, d_operand[1] = {V(sums[0])};
    V d_previous[1] = {V(*carried)};
    Cell::backward_first(a.maths, saved, previous, d_operand, d_previous, d_a);
    *carried = d_previous[0].v;
    CellBackward<Cell, S>::store(a, d, n, i, u, K::hidden_plane(0), d_a[0]);
  }
};

// With several heads: copies the gradients of each row's first step to the location from which
// InitialHidden reads.
template <class Cell, class S>
struct FirstGates {
  static constexpr const char* name = "gradients of the first steps by head";
  BackwardData<S> a;

  FASTRNN_CELL Index count() const { return a.D * a.rows.B * Cell::gradients * a.H; }
  FASTRNN_CELL void element(Index n) const {
    const Index u = n % a.H, plane = n / a.H % Cell::gradients;
    const Index i = n / a.H / Cell::gradients % a.rows.B, d = n / a.H / Cell::gradients / a.rows.B;
    if (a.rows.length(i) == 0) return;
    const Index pair = a.rows.pair(a.walk(d).first_step(i), i);
    *a.headed(a.by_head_after, d, i, Cell::gradients, plane, u) =
        a.gates_row(d, pair)[plane * a.Hp + u];
  }
};

// d_h0: one more product, after each row's first step.
template <class Cell, class S>
struct InitialHidden : DeviceCell<Cell, S> {
  static constexpr const char* name = "gradients of the initial states";
  using K = DeviceCell<Cell, S>;
  using typename K::C;
  using Weight = S;
  using Operand = C;
  static constexpr int planes = 1;
  BackwardData<S> a;

  FASTRNN_CELL Index directions() const { return a.D; }
  FASTRNN_CELL Index rows() const { return a.rows.B; }
  FASTRNN_CELL Index units() const { return a.O; }
  FASTRNN_CELL Index depth() const { return a.depth; }
  FASTRNN_CELL bool runs(Index d, Index i) const {
    const Walk walk = a.walk(d);
    return a.rows.length(i) > 0 && !walk.starts_fresh(walk.first_step(i), i);
  }
  FASTRNN_CELL const S* weight(Index d, int, Index u) const {
    return a.weights + (d * a.O + u) * a.depth;
  }
  FASTRNN_CELL const C* operand(Index d, Index i, Index u) const {
    if (!runs(d, i)) return a.zeros;
    if (a.by_head)
      return a.headed(a.by_head_after, d, i, Cell::gradients, K::low, a.units.own * a.outs.head(u));
    return a.gates_row(d, a.rows.pair(a.walk(d).first_step(i), i)) + K::low * a.Hp;
  }
  FASTRNN_CELL void finish(Index d, Index i, Index u, const C* sums) const {
    C dh = 0;
    if (a.rows.length(i) == 0)  // the final state is the initial state
      dh = state_value<S>(a.d_h_n, d, i, u);
    else if (runs(d, i))
      dh = Cell::carries && !a.P ? sums[0] + a.carried[a.state(d, i, a.O, u)] : sums[0];
    narrow(dh, a.d_h0 + a.state(d, i, a.O, u));
  }
};

template <class S>
struct InitialCell {
  static constexpr const char* name = "gradients of the initial cells";
  using C = typename ComputeOf<S>::type;
  BackwardData<S> a;

  FASTRNN_CELL Index count() const { return a.D * a.rows.B * a.H; }
  FASTRNN_CELL void element(Index n) const {
    const Index u = n % a.H, i = n / a.H % a.rows.B, d = n / a.H / a.rows.B;
    const Walk walk = a.walk(d);
    C dc = 0;
    if (a.rows.length(i) == 0)
      dc = state_value<S>(a.d_c_n, d, i, u);
    else if (!walk.starts_fresh(walk.first_step(i), i))
      dc = a.d_c[n];
    narrow(dc, a.d_c0 + n);
  }
};

template <class Cell, class S>
class Backward : DeviceCell<Cell, S> {
  using K = DeviceCell<Cell, S>;
  using typename K::C;

 public:
  // Lays out the scratch from `base`; if that is null, only computes its size.
  Backward(const Layer& layer, void* base) : layer_(layer), gradients_(layer) {
    Arena arena(base);
    const Index D = layer.directions, B = layer.rows.B, N = layer.rows.pairs, H = layer.H;
    const Index O = layer.O;
    const Index heads = layer.maths.heads;
    units_ = heads_of(H, heads), outs_ = heads_of(O, heads);
    Hp_ = padded(H), Op_ = padded(O);
    saved_width_ = (Cell::saved + (layer.P ? 1 : 0)) * Hp_;
    width_ = layer.consume_saved ? saved_width_ : Cell::gradients * Hp_;
    depth_ = (K::high - K::low) * units_.place;
    second_depth_ = layer.P ? Op_ : (K::gates - K::first) * units_.place;
    d_gates_group_ = layer.consume_saved ? layer.saved_group : N * width_;
    d_gates_ = layer.consume_saved ? static_cast<C*>(layer.saved) : arena.take<C>(D * N * width_);
    zeros_size_ = greatest(greatest(depth_, second_depth_), Op_);
    zeros_ = arena.take<C>(zeros_size_);
    weights_ = arena.take<S>(D * O * depth_);
    second_weights_ = arena.take<S>(second_depth_ ? D * H * second_depth_ : 0);
    by_head_width_ = Cell::gradients * units_.width();
    by_head_ = arena.take<C>(heads > 1 ? 2 * D * B * by_head_width_ : 0);
    d_c_ = arena.take<C>(Cell::states > 1 ? D * B * H : 0);
    carried_ = arena.take<C>(Cell::carries ? D * B * O : 0);
    d_proj_ = arena.take<C>(layer.P ? D * N * Op_ : 0);
    products_ = arena.take<C>(uses_library() ? D * B * O : 0);
    narrow_gates_ = arena.take<S>(uses_library() && sizeof(S) != sizeof(C) ? D * B * depth_ : 0);
    gradients_.lay_out(arena);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run() {
    prepare();
    const std::unique_ptr<LibraryProduct> library = library_product();
    for (Index s = layer_.rows.T; s-- > 0;) step(s, library.get());
    const BackwardData<S> a = data(0);
    if (a.d_h0 && a.by_head) launch_elements(stream(), FirstGates<Cell, S>{a});
    if (a.d_h0) launch_product(stream(), InitialHidden<Cell, S>{{}, a});
    if (a.d_c0) launch_elements(stream(), InitialCell<S>{a});
    gradients_.run({d_gates_, d_gates_group_, width_, Hp_, d_proj_});
  }

 private:
  void* stream() const { return layer_.tools.stream; }
  // With packed data the number of rows varies from step to step, so no product has a fixed size.
  bool uses_library() const {
    return many_rows<S>(layer_) && !K::two_products && !layer_.batch_sizes;
  }

  void prepare() {
    launch_elements(stream(), Fill<C>{zeros_, zeros_size_});
    const Index rows = layer_.directions * layer_.rows.B;
    if (by_head_) launch_elements(stream(), Fill<C>{by_head_, 2 * rows * by_head_width_});
    if (narrow_gates_) launch_elements(stream(), Fill<S>{narrow_gates_, rows * depth_});
    for (Index d = 0; d < layer_.directions; ++d) pack(d);
  }

  // Columns of the weights: those of W_hh's gates in the order of their planes, then
  // those of the second product, W_hr or W_hn.
  void pack(Index d) {
    const Parameters& p = layer_.parameters[d];
    const fastrnn::Weight& w = p.weight_hh;
    const Index H = layer_.H, O = layer_.O, gate = units_.own * w.row;
    const auto pack_gate = [&](int g, const Heads& outs, S* to, Index stride) {
      launch_elements(stream(), PackWeights<S>{static_cast<const S*>(w.data) + g * gate, w.unit,
                                               w.row, outs.count * outs.own, units_.own,
                                               units_.place, to, stride, outs, w.head, 0});
    };
    S* to = weights_ + d * O * depth_;
    if (K::high - K::low > K::first)  // a plane that no gate reads
      launch_elements(stream(), Fill<S>{to, O * depth_});
    for (int g = 0; g < K::first; ++g)
      pack_gate(g, outs_, to + (K::hidden_plane(g) - K::low) * units_.place, depth_);
    S* second_weights = second_weights_ + d * H * second_depth_;
    if (layer_.P)
      launch_elements(stream(),
                      PackWeights<S>{static_cast<const S*>(p.weight_hr.data), p.weight_hr.unit,
                                     p.weight_hr.row, H, O, Op_, second_weights, second_depth_});
    else
      for (int g = K::first; g < K::gates; ++g)
        pack_gate(g, units_, second_weights + (g - K::first) * units_.place, second_depth_);
  }

  BackwardData<S> data(Index s) const {
    BackwardData<S> a{};
    a.rows = layer_.rows, a.maths = layer_.maths;
    a.s = s, a.D = layer_.directions, a.H = layer_.H, a.O = layer_.O, a.P = layer_.P;
    a.Hp = Hp_, a.Op = Op_;
    a.units = units_, a.outs = outs_;
    a.saved = static_cast<const C*>(layer_.saved);
    a.saved_group = layer_.saved_group, a.saved_width = saved_width_;
    a.d_gates = d_gates_, a.d_gates_group = d_gates_group_, a.width = width_;
    a.zeros = zeros_, a.narrow_gates = narrow_gates_;
    a.weights = weights_, a.depth = depth_;
    a.second_weights = second_weights_, a.second_depth = second_depth_;
    a.by_head_width = by_head_width_;
    if (by_head_) {
      const Index one = a.D * a.rows.B * by_head_width_;
      a.by_head = by_head_ + s % 2 * one, a.by_head_after = by_head_ + (s + 1) % 2 * one;
    }
    a.output = layer_.output, a.cell = layer_.cell, a.h0 = layer_.h0, a.c0 = layer_.c0;
    a.d_output = layer_.d_output, a.d_hidden = layer_.d_hidden, a.d_cell = layer_.d_cell;
    a.d_above = static_cast<const C*>(layer_.d_above);
    a.d_h_n = layer_.d_h_n, a.d_c_n = layer_.d_c_n;
    a.d_c = d_c_, a.carried = carried_, a.d_proj = d_proj_;
    a.d_h0 = static_cast<S*>(layer_.d_h0), a.d_c0 = static_cast<S*>(layer_.d_c0);
    return a;
  }

  // The operand of the product of a step with many rows: the gates' gradients of step t+1, or
  // their narrow copy if the compute type is not the storage type.
  const S* library_operand(Index d, Index s, Index& stride) const {
    stride = narrow_gates_ ? depth_ : width_;
    if (narrow_gates_) return narrow_gates_ + d * layer_.rows.B * depth_;
    const Index t = Walk{layer_.rows, d == 1}.step(s);
    return reinterpret_cast<const S*>(d_gates_ + d * d_gates_group_ + t * layer_.rows.B * width_ +
                                      K::low * Hp_);
  }

  std::unique_ptr<LibraryProduct> library_product() const {
    if (!uses_library()) return nullptr;
    Index stride = 0;
    const S* operand = library_operand(0, 0, stride);
    const Index O = layer_.O;
    auto product = std::make_unique<LibraryProduct>(
        layer_.tools, any(Matrices<S>{layer_.rows.B, O, depth_, operand, stride, 1, weights_,
                                      depth_, 1, products_, O, false}));
    return product->usable() ? std::move(product) : nullptr;
  }

  void step(Index s, const LibraryProduct* library) {
    const BackwardData<S> a = data(s);
    const BackwardStep<Cell, S> first{{}, a};
    if (library) {
      const bool any_after = s + 1 < layer_.rows.T;
      Index stride = 0;
      for (Index d = 0; any_after && d < a.D; ++d)
        library->run(library_operand(d, s + 1, stride), weights_ + d * a.O * depth_,
                     products_ + d * a.rows.B * a.O);
      launch_finish(stream(), first, any_after ? products_ : nullptr, a.O);
    } else {
      launch_product(stream(), first);
    }
    if constexpr (K::two_products) {
      launch_product(stream(), BackwardSecond<Cell, S>{{}, a});
    } else if constexpr (Cell::projects) {
      if (layer_.P) launch_product(stream(), BackwardProjection<Cell, S>{{}, a});
    }
  }

  const Layer& layer_;
  Gradients<Cell, S, C> gradients_;
  Heads units_, outs_;
  Index Hp_ = 0, Op_ = 0, saved_width_ = 0, width_ = 0, depth_ = 0, second_depth_ = 0;
  Index by_head_width_ = 0, d_gates_group_ = 0, zeros_size_ = 0;
  C *d_gates_ = nullptr, *zeros_ = nullptr, *d_c_ = nullptr, *carried_ = nullptr;
  C *d_proj_ = nullptr, *products_ = nullptr, *by_head_ = nullptr;
  S *weights_ = nullptr, *second_weights_ = nullptr, *narrow_gates_ = nullptr;
  std::size_t used_ = 0;
};

}  // namespace fastrnn::cuda
