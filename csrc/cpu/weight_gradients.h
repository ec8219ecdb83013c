// The gradients of a layer's weights and biases, after the recurrence.
//
// Maths         the gradient of a matrix is a sum over all (step, row) pairs n of outer products of
//               gate gradients and the matrix's operand; that of a bias a sum of gate gradients:
//                 dW_ih = Σ_n da_n ⊗ x_n        dW_hh = Σ_n da_n ⊗ h_{n-1}     db = Σ_n da_n
//                 dW_hn = Σ_n dn_n ⊗ (r∘h)_n    dW_hr = Σ_n dh_n ⊗ m_n (projection: the hidden
//                 units before it)
// Layouts       rows     [slot][group of `rows` units][pair][unit], packed gate gradients
//               panels   [slot][block of columns][pair][column], packed operands
//               sums     the weights' gradients in compute type, where storage is narrower
//               bias_sums [gradient][Hp], from part to part (Layer::part)
// Sums          over the pairs in blocks of kPairs, one block after the other: the same bits
//               whatever the number of threads. Parts of a layer continue the sums of the part
//               before (Layer::starts_sums, ends_sums).
// Threads       the threads pack several blocks of pairs together, a slot for each; after a barrier
//               they divide the blocks of the results. Barriers are few because a thread without a
//               core delays the others at each.
// Few pairs     a gradient of at most kFewPairs pairs costs far more to write than to compute. Then
//               each row is computed and written once, without packing rows or adding to sums.
// Cost          G·H·(I + O) products a pair; one pass over the gate gradients for the biases.
#pragma once

#include "backward_tiling.h"

namespace fastrnn::FASTRNN_ISA {

template <class S>
class WeightGradients : ColumnTiling<S> {
  using K = ColumnTiling<S>;
  using K::lanes, K::wide, K::rows, K::block_units;
  using typename K::C, typename K::V;
  using Hidden = PreviousHidden<S>;
  static constexpr Index kPairs = 256;
  static constexpr Index kFewPairs = 16;
  static constexpr int kBiasVectors = 8;  // summed over the pairs side by side

 public:
  WeightGradients(const Layer& layer, const CellShape& shape)
      : layer_(layer),
        shape_(shape),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        saved_width_(saved_width(layer, shape.saved)) {}

  // The sums that parts of a layer continue: before all whose size depends on that of a part.
  void lay_out_sums(Arena& arena) {
    const Index products = shape_.gates * layer_.H * (layer_.I + layer_.O) + layer_.P * layer_.H;
    sums_ = sizeof(S) != sizeof(C) ? arena.take<C>(products) : nullptr;
    bias_sums_ = layer_.part ? arena.take<C>(shape_.gradients * Hp_) : nullptr;
  }

  void lay_out_slots(Arena& arena) {
    Product products[kProducts];
    describe_products(0, {}, products);
    const Product& last = products[kWeightHr];
    rows_slot_ = (last.rows_at + last.groups()) * rows * kPairs;
    panels_slot_ = (last.panels_at + last.panels()) * block_units * kPairs;
    slots_ = count_slots();
    packed_rows_ = arena.take<C>(slots_ * rows_slot_);
    panels_ = arena.take<C>(slots_ * panels_slot_);
  }

  // Direction d, by all threads. hidden: the operands of W_hh.
  FASTRNN_NOINLINE void run(Index d, const GateGradients<C>& gradients, const Hidden& hidden,
                            int thread, int threads) {
    Product products[kProducts];
    describe_products(d, gradients, products);
    Index all = 0;
    for (const Product& p : products) all += p.blocks();
    const bool whole = layer_.starts_sums && layer_.ends_sums;
    if (all > 0 && whole && steps_.pairs <= kFewPairs)
      few_pairs(hidden, d, products, thread, threads);
    else if (all > 0)
      sum_pairs(hidden, d, products, split(all, thread, threads), thread, threads);
    bias_gradients(d, gradients, thread, threads);
  }

 private:
  // ---- the products ---------------------------------------------------------------------------

  // The gradient of one matrix of one direction.
  struct Product {
    const C* d_rows = nullptr;  // [pairs][width], the plane of gate g at planes[g]·Hp
    Index width = 0;
    const int* planes = nullptr;
    int first_gate = 0, gates = 1;  // of the matrix
    Index units = 0;                // rows of a gate
    Index columns = 0;
    S* to = nullptr;      // [gates·units, columns]; null: not wanted
    Index rows_at = 0;    // where packed rows of its planes begin, in groups of rows
    Index panels_at = 0;  // in panels
    C* sums = nullptr;    // [gates·units, columns], where storage is narrower than the sums

    Index groups() const { return ceil_div(units, rows); }
    Index panels() const { return ceil_div(columns, block_units); }
    Index blocks() const { return to ? panels() * gates * groups() : 0; }
  };
  // By matrix: W_hh has the gates of the first product, W_hn those of the second.
  enum { kWeightIh, kWeightHh, kWeightHn, kWeightHr, kProducts };

  // A block of a product: its panel of columns, and its group of rows of a gate.
  struct Spot {
    Index panel, gate, group;
  };

  void sum_pairs(const Hidden& hidden, Index d, const Product (&products)[kProducts],
                 const Range& mine, int thread, int threads) {
    const auto pairs_from = [&](Index n0) { return least(kPairs, steps_.pairs - n0); };
    for (Index begin = 0; begin < steps_.pairs; begin += slots_ * kPairs) {
      const Index end = least(begin + slots_ * kPairs, steps_.pairs);
      if (begin > 0)
        layer_.barriers[0].wait(threads, Barrier::Wait::part);  // every thread has read the slots
      for (Index n0 = begin, slot = 0; n0 < end; n0 += kPairs, ++slot)
        pack_pairs(hidden, d, products, slot, n0, pairs_from(n0), thread, threads);
      layer_.barriers[0].wait(threads, Barrier::Wait::part);
      for (Index n0 = begin, slot = 0; n0 < end; n0 += kPairs, ++slot)
        each_block(products, mine, [&](const Product& p, const Spot& at) {
          add_block(p, slot, at, pairs_from(n0), n0 == 0 && layer_.starts_sums);
        });
    }
    if (steps_.pairs == 0 && layer_.starts_sums)
      each_block(products, mine, [&](const Product& p, const Spot& at) { clear_block(p, at); });
    if (sizeof(S) != sizeof(C) && layer_.ends_sums)
      each_block(products, mine, [&](const Product& p, const Spot& at) { narrow_block(p, at); });
  }

  // Computes and writes each row of the gradients once.
  void few_pairs(const Hidden& hidden, Index d, const Product (&products)[kProducts], int thread,
                 int threads) {
    for (int which = 0; which < kProducts; ++which)
      if (products[which].to)
        pack_panels(hidden, d, which, products[which], 0, 0, steps_.pairs, thread, threads);
    layer_.barriers[0].wait(threads, Barrier::Wait::part);
    for (const Product& p : products) {
      const Range mine = split(p.to ? p.gates * p.units : 0, thread, threads);
      for (Index row = mine.begin; row < mine.end; ++row) one_row(p, row);
    }
  }

  void one_row(const Product& p, Index row) {
    const Index gate = row / p.units, unit = row % p.units;
    const C* d_row = p.d_rows + p.planes[p.first_gate + gate] * Hp_ + unit;
    S* to = p.to + row * p.columns;
    for (Index b = 0; b < p.panels(); ++b) {
      const C* columns = panel(p, 0, b);
      for (int v = 0; v < wide; ++v) {
        const Index column = b * block_units + v * lanes, left = p.columns - column;
        if (left <= 0) break;
        V sum(0);
        for (Index k = 0; k < steps_.pairs; ++k)
          sum = fma(V(d_row[k * p.width]), V::load(columns + k * block_units + v * lanes), sum);
        store_units(sum, to + column, left);
      }
    }
  }

  void describe_products(Index d, const GateGradients<C>& gradients,
                         Product (&products)[kProducts]) const {
    const Parameters to = layer_.d_parameters ? layer_.d_parameters[d] : Parameters{};
    static constexpr int only[] = {0};
    const auto data = [](const Weight& w) { return static_cast<S*>(w.data); };
    const Index H = layer_.H;
    for (Product& p : products) p = {};
    for (int which : {kWeightIh, kWeightHh, kWeightHn}) {
      Product& p = products[which];
      p.d_rows = gradients.d_gates[d];
      p.width = gradients.width;
      p.planes = which == kWeightIh ? shape_.input_gradient : shape_.hidden_gradient;
    }
    Product &ih = products[kWeightIh], &hh = products[kWeightHh];
    Product &hn = products[kWeightHn], &hr = products[kWeightHr];
    ih.gates = shape_.gates;
    ih.units = H;
    ih.columns = layer_.I;
    ih.to = data(to.weight_ih);
    hh.gates = shape_.first_gates;
    hn.first_gate = shape_.first_gates;
    hn.gates = shape_.gates - shape_.first_gates;
    for (Product* p : {&hh, &hn}) {
      p->units = H;
      p->columns = layer_.O;
      p->to = data(to.weight_hh);
    }
    if (shape_.operand < 0) hn = {};
    if (hn.to) hn.to += shape_.first_gates * H * layer_.O;
    hr.d_rows = gradients.d_proj[d];
    hr.width = Op_;
    hr.planes = only;
    hr.units = layer_.P;
    hr.columns = layer_.P ? H : 0;
    hr.to = layer_.P ? data(to.weight_hr) : nullptr;
    hr.rows_at = shape_.gradients * ih.groups();  // after the planes that the others share
    Index panels = 0, sums = 0;
    for (Product& p : products) {
      p.panels_at = panels;
      panels += p.panels();
      p.sums = sums_ ? sums_ + sums : nullptr;
      sums += p.gates * p.units * p.columns;
    }
  }

  // body(product, spot) for the blocks in `mine`: all blocks of a panel before those of the next,
  // so that a panel stays in the cache.
  template <class Body>
  FASTRNN_INLINE void each_block(const Product (&products)[kProducts], const Range& mine,
                                 Body body) const {
    Index at = 0;
    for (const Product& p : products) {
      const Index blocks = p.blocks(), groups = p.groups();
      const Index begin = most(mine.begin - at, 0);
      const Index end = least(mine.end - at, blocks);
      for (Index block = begin; block < end; ++block) {
        const Index row = block % (p.gates * groups);
        body(p, Spot{block / (p.gates * groups), row / groups, row % groups});
      }
      at += blocks;
    }
  }

  // How many blocks of pairs are packed between two barriers: one where there is one thread, else
  // as many as kSlotBytes hold, divided evenly.
  Index count_slots() const {
    constexpr Index kSlotBytes = 16 << 20;
    if (layer_.plan.threads == 1) return 1;
    const Index blocks = ceil_div(steps_.pairs, kPairs);
    const Index room = kSlotBytes / ((rows_slot_ + panels_slot_) * static_cast<Index>(sizeof(C)));
    const Index rounds = ceil_div(blocks, most(room, 1));
    return rounds > 0 ? ceil_div(blocks, rounds) : 1;
  }

  C* packed_group(const Product& p, Index slot, const Spot& at) const {
    const Index group = p.planes[p.first_gate + at.gate] * p.groups() + at.group;
    return packed_rows_ + slot * rows_slot_ + (p.rows_at + group) * rows * kPairs;
  }
  C* panel(const Product& p, Index slot, Index panel) const {
    return panels_ + slot * panels_slot_ + (p.panels_at + panel) * block_units * kPairs;
  }

  void pack_pairs(const Hidden& hidden, Index d, const Product (&products)[kProducts], Index slot,
                  Index n0, Index count, int thread, int threads) {
    pack_rows(products, slot, n0, count, thread, threads);
    for (int which = 0; which < kProducts; ++which)
      if (products[which].to)
        pack_panels(hidden, d, which, products[which], slot, n0, count, thread, threads);
  }

  // ---- packing --------------------------------------------------------------------------------

  // The gate gradients of `count` pairs, in groups of `rows` units: each plane once, for all
  // products that read it.
  void pack_rows(const Product (&products)[kProducts], Index slot, Index n0, Index count,
                 int thread, int threads) {
    const Product &ih = products[kWeightIh], &hr = products[kWeightHr];
    const Index groups = ih.groups();
    for (int plane = 0; plane < shape_.gradients; ++plane)
      pack_groups(packed_rows_ + slot * rows_slot_ + plane * groups * rows * kPairs,
                  ih.d_rows + n0 * ih.width + plane * Hp_, ih.width, layer_.H,
                  split(groups, thread, threads), count);
    if (hr.to)
      pack_groups(packed_group(hr, slot, Spot{0, 0, 0}), hr.d_rows + n0 * hr.width, hr.width,
                  hr.units, split(hr.groups(), thread, threads), count);
  }

  static void pack_groups(C* to, const C* from, Index width, Index units, const Range& groups,
                          Index count) {
    constexpr Index kRun = 16;  // pairs whose gradients stay in the cache for the next group
    for (Index k0 = 0; k0 < count; k0 += kRun)
      for (Index m = groups.begin; m < groups.end; ++m) {
        const C* source = from + k0 * width + m * rows;
        C* packed = to + (m * kPairs + k0) * rows;
        const Index have = least(rows, units - m * rows), end = least(k0 + kRun, count);
        for (Index k = k0; k < end; ++k, source += width, packed += rows) {
          if (have == rows)
            __builtin_memcpy(packed, source, rows * sizeof(C));
          else
            for (Index r = 0; r < rows; ++r) packed[r] = r < have ? source[r] : C(0);
        }
      }
  }

  // The operand of `count` pairs, in blocks of columns.
  void pack_panels(const Hidden& hidden, Index d, int which, const Product& p, Index slot, Index n0,
                   Index count, int thread, int threads) {
    const Range mine = split(p.panels(), thread, threads);
    if (mine.begin == mine.end) return;
    PairWalk pair(steps_, n0);
    for (Index k = 0; k < count; ++k, pair.advance()) {
      const Operand<S> row = operand(hidden, d, which, pair, n0 + k);
      for (Index b = mine.begin; b < mine.end; ++b) {
        C* to = panel(p, slot, b) + k * block_units;
        for (int v = 0; v < wide; ++v)
          operand_tile(row, b * block_units + v * lanes, p.columns).store(to + v * lanes);
      }
    }
  }

  Operand<S> operand(const Hidden& hidden, Index d, int which, const PairWalk& pair,
                     Index n) const {
    if (which == kWeightIh)
      return {at<const S>(layer_.input, steps_, pair.t, pair.i), layer_.input.unit, nullptr};
    if (which == kWeightHn) return {nullptr, 1, saved_plane(d, n, shape_.operand)};
    if (which == kWeightHr) return {nullptr, 1, saved_plane(d, n, shape_.saved)};
    return hidden(pair.t, pair.i);
  }

  const C* saved_plane(Index d, Index n, int plane) const {
    return static_cast<const C*>(layer_.saved) + d * layer_.saved_group + n * saved_width_ +
           plane * Hp_;
  }

  // ---- the blocks of the results --------------------------------------------------------------

  // Rows of the matrix in a block.
  static Index rows_of(const Product& p, const Spot& at) {
    return least(rows, p.units - at.group * rows);
  }

  // Row r of a block, in the gradient.
  static S* result_row(const Product& p, const Spot& at, Index r) {
    return p.to + (at.gate * p.units + at.group * rows + r) * p.columns;
  }
  // Where its sums are: in the gradient itself, or in scratch where storage is narrower.
  static C* sums_row(const Product& p, const Spot& at, Index r) {
    if constexpr (sizeof(S) == sizeof(C))
      return result_row(p, at, r);
    else
      return p.sums + (at.gate * p.units + at.group * rows + r) * p.columns;
  }

  void add_block(const Product& p, Index slot, const Spot& at, Index count, bool start) {
    if (K::half_block(p.columns, at.panel))
      add_vectors<wide / 2>(p, slot, at, count, start);
    else
      add_vectors<wide>(p, slot, at, count, start);
  }

  template <int N>
  FASTRNN_INLINE void add_vectors(const Product& p, Index slot, const Spot& at, Index count,
                                  bool start) {
    const Index have = rows_of(p, at), column = at.panel * block_units;
    const bool whole = p.columns - column >= N * lanes;
    for (Index r = 0; whole && r < have; ++r)  // prefetched while the product runs
      for (int v = 0; v < N; ++v) __builtin_prefetch(sums_row(p, at, r) + column + v * lanes, 1);
    V acc[rows][N];
    clear(acc);
    accumulate_packed<rows, N>(acc, packed_group(p, slot, at), count, panel(p, slot, at.panel),
                               block_units);
    const Sums<rows, N, C> block(acc);
    for (Index r = 0; r < rows && r < have; ++r) {
      C* to = sums_row(p, at, r) + column;
      for (int v = 0; v < N; ++v, to += lanes) {
        const Index left = whole ? Index{lanes} : p.columns - column - v * lanes;
        if (left <= 0) break;
        store_units(start ? block.v[r][v] : load_units<C>(to, left) + block.v[r][v], to, left);
      }
    }
  }

  void clear_block(const Product& p, const Spot& at) {
    const Index column = at.panel * block_units, count = least(block_units, p.columns - column);
    for (Index r = 0; r < rows_of(p, at); ++r) {
      C* to = sums_row(p, at, r) + column;
      for (Index u = 0; u < count; ++u) to[u] = C(0);
    }
  }

  void narrow_block(const Product& p, const Spot& at) {
    const Index column = at.panel * block_units, count = least(block_units, p.columns - column);
    for (Index r = 0; r < rows_of(p, at); ++r)
      scatter(result_row(p, at, r) + column, sums_row(p, at, r) + column, count);
  }

  // ---- the biases -----------------------------------------------------------------------------

  // Each plane of the gate gradients is summed over the pairs once, for all biases that read it.
  void bias_gradients(Index d, const GateGradients<C>& gradients, int thread, int threads) {
    const Parameters& to = layer_.d_parameters[d];
    if (!to.bias_ih.data && !to.bias_hh.data) return;
    const Range mine = split(ceil_div(layer_.H, lanes), thread, threads);
    for (int plane = 0; plane < shape_.gradients; ++plane)
      in_blocks_of_rows<kBiasVectors>(mine.end - mine.begin, [&](auto count, Index m) {
        sum_plane<count.value>(gradients, d, plane, (mine.begin + m) * lanes);
      });
  }

  // N vectors of a plane, from `unit` on.
  template <int N>
  void sum_plane(const GateGradients<C>& gradients, Index d, int plane, Index unit) {
    const C* from = gradients.d_gates[d] + plane * Hp_ + unit;
    C* kept = bias_sums_ ? bias_sums_ + plane * Hp_ + unit : nullptr;
    V total[N];
    for (int v = 0; v < N; ++v) total[v] = layer_.starts_sums ? V(0) : V::load(kept + v * lanes);
    for (Index n0 = 0; n0 < steps_.pairs; n0 += kPairs) {
      V sum[1][N];
      clear(sum);
      const Index end = least(n0 + kPairs, steps_.pairs);
      for (Index n = n0; n < end; ++n)
#pragma GCC unroll 8
        for (int v = 0; v < N; ++v)
          sum[0][v] = sum[0][v] + V::load(from + n * gradients.width + v * lanes);
      for (int v = 0; v < N; ++v) total[v] = total[v] + sum[0][v];
    }
    for (int v = 0; v < N; ++v) {
      if (!layer_.ends_sums)
        total[v].store(kept + v * lanes);
      else
        store_biases(layer_.d_parameters[d], plane, unit + v * lanes, total[v]);
    }
  }

  void store_biases(const Parameters& to, int plane, Index unit, V sum) const {
    const auto store = [&](const Weight& bias, const int* planes) {
      for (int gate = 0; gate < shape_.gates && bias.data; ++gate)
        if (planes[gate] == plane)
          store_units(sum, static_cast<S*>(bias.data) + gate * layer_.H + unit, layer_.H - unit);
    };
    store(to.bias_ih, shape_.input_gradient);
    store(to.bias_hh, shape_.hidden_gradient);
  }

  const Layer& layer_;
  const CellShape& shape_;
  const Steps& steps_;
  const Index Hp_, Op_, saved_width_;
  C *packed_rows_ = nullptr, *panels_ = nullptr, *sums_ = nullptr, *bias_sums_ = nullptr;
  Index rows_slot_ = 0, panels_slot_ = 0, slots_ = 1;  // elements of a slot; slots
};

}  // namespace fastrnn::FASTRNN_ISA
