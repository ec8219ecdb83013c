// The gradients of a layer's weights and biases, after the recurrence.
//
// Maths         the gradient of a matrix is a sum over all (step, row) pairs n of outer products of
//               gate gradients and the matrix's operand; that of a bias a sum of gate gradients:
//                 dW_ih = Σ_n da_n ⊗ x_n        dW_hh = Σ_n da_n ⊗ h_{n-1}     db = Σ_n da_n
//                 dW_hn = Σ_n dn_n ⊗ (r∘h)_n    dW_hr = Σ_n dh_n ⊗ m_n (projection: the hidden
//                 units before it)
//               Vectors are of hidden units, as the gate gradients are stored; the operands are
//               broadcast. So a narrow layer computes little padding: its units fill whole
//               vectors where its columns would not fill a block of them.
// Layouts       panel    [pair][vector][lane], at most kWide vectors of a plane of gate gradients
//               columns  [block][pair][kColumns], an operand
//               sums     [panel][column][vector][lane]: the gradient, transposed
//               bias_sums [gradient][Hp]
// Sums          over the pairs in blocks of kPairs, one block after the other: the same bits
//               whatever the number of threads. Parts of a layer continue the sums of the part
//               before (Layer::part, starts_sums, ends_sums).
// Threads       tiles of the results are split; each thread packs what its tiles read, and none
//               waits for another.
// Few pairs     a gradient of at most kFewPairs pairs costs far more to write than to compute. Then
//               each row is computed and written once, along its columns, without sums.
// Cost          G·H·(I + O) products a pair; one pass over the gate gradients for the biases.
#pragma once

#include <limits>

#include "backward_tiling.h"

namespace fastrnn::FASTRNN_ISA {

template <class S>
class WeightGradients : ColumnTiling<S> {
  using K = ColumnTiling<S>;
  using K::lanes, K::wide;
  using typename K::C, typename K::V;
  using Hidden = PreviousHidden<S>;
  static constexpr Index kFewPairs = 16;
  static constexpr Index kColumns = accumulators();  // of a block: whole tiles of any width
  // Columns of a tile of N vectors of units. Twelve sums hide an addition's latency; a wider tile
  // of one or two vectors would hold more padding.
  static constexpr int columns_of(int N) {
    return accumulators() / N < 12 ? accumulators() / N : 12;
  }

 public:
  static constexpr Index kPairs = 256;  // of a block

  WeightGradients(const Layer& layer, const CellShape& shape)
      : layer_(layer),
        shape_(shape),
        steps_(*layer.steps),
        Hp_(padded(layer.H)),
        Op_(padded(layer.O)),
        saved_width_(saved_width(layer, shape.saved)) {}

  // The sums that parts of a layer continue: before all whose size depends on that of a part.
  void lay_out_sums(Arena& arena) {
    Plane planes[kPlanes];
    const Index count = describe(0, {}, planes);
    Index sums = 0, most_columns = 0;
    for (Index p = 0; p < count; ++p)
      for (const Product& product : planes[p].products) {
        const Index columns = padded_columns(product.columns);
        sums = product.sums_at + planes[p].vectors() * lanes * columns;
        most_columns = most(most_columns, columns);
      }
    keeps_sums_ = layer_.part || steps_.pairs > kPairs;
    sums_slot_ = keeps_sums_ ? 0 : most_columns * wide * lanes;
    sums_ = arena.take<C>(keeps_sums_ ? sums : sums_slot_ * layer_.plan.threads);
    bias_sums_ = arena.take<C>(shape_.gradients * Hp_);
  }

  void lay_out_slots(Arena& arena) {
    Index columns = 0;
    for (int which = 0; which < kOperands; ++which) {
      columns_at_[which] = columns;
      columns += ceil_div(operand_columns(which), kColumns) * kBlock;
    }
    slot_ = columns + wide * lanes * kPairs;
    slots_ = arena.take<C>(slot_ * layer_.plan.threads);
  }

  // Adds a block of pairs in direction d, by all threads: block after block, from pair 0 on.
  // hidden: the operands of W_hh.
  FASTRNN_NOINLINE void add(Index d, const GateGradients<C>& gradients, const Hidden& hidden,
                            const Range& block, int thread, int threads) {
    Plane planes[kPlanes];
    const Index count = describe(d, gradients, planes);
    const Pairs pairs{block.begin, block.end - block.begin, layer_.starts_sums && block.begin == 0,
                      layer_.ends_sums && block.end == steps_.pairs};
    const Task task{d, hidden, planes, count, pairs, thread, threads, slots_ + thread * slot_};
    if (pairs.start && pairs.end && pairs.count <= kFewPairs)
      few_pairs(task);
    else
      sum_pairs(task);
  }

 private:
  static constexpr Index kAll = std::numeric_limits<Index>::max() / 2;
  // From one block of an operand's columns to the next, with room for the last vector of a pair.
  static constexpr Index kBlock = kPairs * kColumns + lanes;

  // ---- what there is to compute -----------------------------------------------------------------

  // By their operand. W_hh has the gates of the first product, W_hn those of the second.
  enum { kInput, kHidden, kReset, kUnprojected, kOperands };

  // The gradient of one gate of a matrix.
  struct Product {
    S* to = nullptr;  // [units, columns]; null: not wanted
    Index columns = 0;
    int operand = kInput;
    Index sums_at = 0;

    template <int N>
    Index tiles() const {
      return to ? ceil_div(columns, columns_of(N)) : 0;
    }
  };
  // A plane of gate gradients, and the products that read it.
  struct Plane {
    const C* rows = nullptr;  // [pairs][width]
    Index width = 0, units = 0;
    int gradient = 0;
    bool bias = false;  // its sum is wanted
    Product products[2];

    Index vectors() const { return ceil_div(units, lanes); }
    template <int N>
    Index tiles() const {
      return bias + products[0].template tiles<N>() + products[1].template tiles<N>();
    }
    // Those of product `which` among `mine`, tiles of a panel: the biases, then the products.
    template <int N>
    Range tiles_of(int which, const Range& mine) const {
      const Index at = bias + (which == 1 ? products[0].template tiles<N>() : 0);
      return {most(mine.begin - at, 0), least(mine.end - at, products[which].template tiles<N>())};
    }
  };
  static constexpr int kPlanes = 5;  // gradients of a cell, and the projection

  Index describe(Index d, const GateGradients<C>& gradients, Plane (&planes)[kPlanes]) const {
    const Parameters to = layer_.d_parameters ? layer_.d_parameters[d] : Parameters{};
    const Index H = layer_.H;
    const auto rows_of = [](const Weight& w, Index elements) {
      return w.data ? static_cast<S*>(w.data) + elements : nullptr;
    };
    int count = 0;
    for (; count < shape_.gradients; ++count) {
      Plane& plane = planes[count];
      plane.rows = gradients.d_gates[d] + count * Hp_;
      plane.width = gradients.width;
      plane.units = H;
      plane.gradient = count;
      for (int gate = 0; gate < shape_.gates; ++gate) {
        if (shape_.input_gradient[gate] == count) {
          plane.products[0] = {rows_of(to.weight_ih, gate * H * layer_.I), layer_.I, kInput, 0};
          plane.bias |= to.bias_ih.data != nullptr;
        }
        if (shape_.hidden_gradient[gate] == count) {
          const bool reset = shape_.operand >= 0 && gate >= shape_.first_gates;
          plane.products[1] = {rows_of(to.weight_hh, gate * H * layer_.O), layer_.O,
                               reset ? kReset : kHidden, 0};
          plane.bias |= to.bias_hh.data != nullptr;
        }
      }
    }
    if (layer_.P) {
      Plane& plane = planes[count++];
      plane.rows = gradients.d_proj[d];
      plane.width = Op_;
      plane.units = layer_.P;
      plane.products[0] = {rows_of(to.weight_hr, 0), H, kUnprojected, 0};
    }
    Index sums = 0;
    for (int p = 0; p < count; ++p)
      for (Product& product : planes[p].products) {
        product.sums_at = sums;
        sums += planes[p].vectors() * lanes * padded_columns(product.columns);
      }
    return count;
  }

  static Index padded_columns(Index columns) { return ceil_div(columns, kColumns) * kColumns; }

  Index operand_columns(int which) const {
    if (which == kInput) return layer_.I;
    if (which == kHidden) return layer_.O;
    return which == kReset ? (shape_.operand >= 0) * layer_.O : (layer_.P > 0) * layer_.H;
  }

  // A block of pairs: whether the sums start with it, and end.
  struct Pairs {
    Index begin, count;
    bool start, end;
  };

  // What a thread computes of a direction.
  struct Task {
    Index d;
    const Hidden& hidden;
    const Plane (&planes)[kPlanes];
    Index count;  // of planes
    Pairs pairs;
    int thread, threads;
    C* slot;  // the thread's scratch
  };

  // body(Int<N>, plane, first vector, tiles) for the panels of N vectors that have tiles in `mine`.
  template <class Body>
  FASTRNN_INLINE static void each_panel(const Task& task, const Range& mine, Body body) {
    Index at = 0;
    for (Index p = 0; p < task.count; ++p) {
      const Plane& plane = task.planes[p];
      const Index vectors = plane.vectors(), panels = ceil_div(vectors, wide);
      for (Index b = 0; b < panels; ++b) {
        const Range part = split(vectors, static_cast<int>(b), static_cast<int>(panels));
        const auto panel = [&](auto width, Index first) {
          constexpr int N = decltype(width)::value;
          const Index tiles = plane.template tiles<N>();
          const Range here{most(mine.begin - at, 0), least(mine.end - at, tiles)};
          if (here.begin < here.end) body(width, plane, first, here);
          at += tiles;
        };
        block_of_rows<wide>(part.end - part.begin, part.begin, panel);
      }
    }
  }

  void sum_pairs(const Task& task) {
    Index all = 0;
    each_panel(task, {0, kAll},
               [&](auto, const Plane&, Index, const Range& tiles) { all += tiles.end; });
    const Range mine = split(all, task.thread, task.threads);
    Range read[kOperands];  // columns
    for (Range& range : read) range = {kAll, 0};
    each_panel(task, mine, [&](auto width, const Plane& plane, Index, const Range& tiles) {
      constexpr int N = decltype(width)::value;
      for (int which = 0; which < 2; ++which) {
        const Range part = plane.template tiles_of<N>(which, tiles);
        Range& range = read[plane.products[which].operand];
        if (part.begin >= part.end) continue;
        range.begin = least(range.begin, part.begin * columns_of(N));
        range.end = most(range.end, part.end * columns_of(N));
      }
    });
    for (int which = 0; which < kOperands; ++which) pack_columns(task, which, read[which]);
    each_panel(task, mine, [&](auto width, const Plane& plane, Index first, const Range& tiles) {
      add_panel<decltype(width)::value>(task, plane, first, tiles);
    });
  }

  // ---- packing --------------------------------------------------------------------------------

  C* columns(const Task& task, int which, Index block) const {
    return task.slot + columns_at_[which] + block * kBlock;
  }

  // The blocks of an operand that hold the columns in `range`.
  void pack_columns(const Task& task, int which, const Range& range) const {
    const Pairs& pairs = task.pairs;
    const Index begin = range.begin / kColumns, end = ceil_div(range.end, kColumns);
    if (begin >= end) return;
    const Index count = operand_columns(which);
    PairWalk pair(steps_, pairs.begin);
    for (Index k = 0; k < pairs.count; ++k, pair.advance()) {
      const Operand<S> row = operand(task, which, pair, pairs.begin + k);
      for (Index b = begin; b < end; ++b) {
        C* to = columns(task, which, b) + k * kColumns;
        // The last vector may reach into the next pair's columns, which are written after it.
        for (Index c = 0; c < kColumns; c += lanes)
          operand_tile(row, b * kColumns + c, count).store(to + c);
      }
    }
  }

  Operand<S> operand(const Task& task, int which, const PairWalk& pair, Index n) const {
    if (which == kInput)
      return {at<const S>(layer_.input, steps_, pair.t, pair.i), layer_.input.unit, nullptr};
    if (which == kHidden) return task.hidden(pair.t, pair.i);
    return {nullptr, 1,
            static_cast<const C*>(layer_.saved) + task.d * layer_.saved_group + n * saved_width_ +
                (which == kReset ? shape_.operand : shape_.saved) * Hp_};
  }

  // ---- the results ------------------------------------------------------------------------------

  // Adds a block of pairs to tiles of the panel of N vectors of units from `first` on.
  template <int N>
  FASTRNN_NOINLINE void add_panel(const Task& task, const Plane& plane, Index first,
                                  const Range& tiles) {
    const Pairs& pairs = task.pairs;
    C* panel = task.slot + slot_ - wide * lanes * kPairs;
    const C* from = plane.rows + pairs.begin * plane.width + first * lanes;
    for (Index k = 0; k < pairs.count; ++k)
      for (int v = 0; v < N; ++v)
        V::load(from + k * plane.width + v * lanes).store(panel + (k * N + v) * lanes);
    if (plane.bias && tiles.begin == 0) add_biases<N>(task, plane, first, panel, N * lanes);
    for (int which = 0; which < 2; ++which) {
      const Product& product = plane.products[which];
      const Range part = plane.template tiles_of<N>(which, tiles);
      if (part.begin >= part.end) continue;
      C* sums =
          sums_ + (keeps_sums_ ? product.sums_at + first * lanes * padded_columns(product.columns)
                               : task.thread * sums_slot_);
      for (Index tile = part.begin; tile < part.end; ++tile) {
        constexpr int R = columns_of(N);
        const Index column = tile * R;
        add_tile<R, N>(sums + column * N * lanes,
                       columns(task, product.operand, column / kColumns) + column % kColumns, panel,
                       pairs);
      }
      if (pairs.end) {
        const Index end = least(part.end * columns_of(N), product.columns);
        for (Index c = part.begin * columns_of(N); c < end; c += lanes)
          for (int v = 0; v < N; ++v)
            store_square(product, sums + v * lanes, N * lanes, {c, least(c + lanes, end)},
                         (first + v) * lanes, plane.units);
      }
    }
  }

  template <int R, int N>
  FASTRNN_INLINE static void add_tile(C* to, const C* operand, const C* panel, const Pairs& pairs) {
    for (Index at = 0; !pairs.start && at < R * N * lanes; at += 64 / sizeof(C))
      __builtin_prefetch(to + at, 1);  // while the product runs
    V acc[R][N];
    clear(acc);
    accumulate_packed<R, N>(acc, operand, kColumns, pairs.count, panel, N * lanes);
    const Sums<R, N, C> tile(acc);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < N; ++v, to += lanes)
        (pairs.start ? tile.v[r][v] : V::load(to) + tile.v[r][v]).store(to);
  }

  // The sums of some columns, at most `lanes`, and of a vector of units, to the gradient's rows.
  static void store_square(const Product& product, const C* sums, Index stride,
                           const Range& columns, Index unit, Index units) {
    V square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      square[i] =
          columns.begin + i < columns.end ? V::load(sums + (columns.begin + i) * stride) : V(0);
    transpose(square);
    const Index rows = least(lanes, units - unit);
    S* to = product.to + unit * product.columns + columns.begin;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i)
      if (i < rows) store_units(square[i], to + i * product.columns, columns.end - columns.begin);
  }

  // Adds the sums of N vectors of a plane, for all biases that read it.
  template <int N>
  FASTRNN_INLINE void add_biases(const Task& task, const Plane& plane, Index first, const C* from,
                                 Index stride) {
    const Pairs& pairs = task.pairs;
    V acc[1][N];
    clear(acc);
    for (Index k = 0; k < pairs.count; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) acc[0][v] = acc[0][v] + V::load(from + k * stride + v * lanes);
    for (int v = 0; v < N; ++v) {
      const Index unit = (first + v) * lanes;
      C* kept = bias_sums_ + plane.gradient * Hp_ + unit;
      const V sum = pairs.start ? acc[0][v] : V::load(kept) + acc[0][v];
      if (pairs.end)
        store_biases(layer_.d_parameters[task.d], plane.gradient, unit, sum);
      else
        sum.store(kept);
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

  // ---- few pairs --------------------------------------------------------------------------------

  void few_pairs(const Task& task) {
    for (int which = 0; which < kOperands; ++which) {
      const Index count = operand_columns(which);
      if (count == 0) continue;
      PairWalk pair(steps_, 0);
      C* to = task.slot + columns_at_[which];
      for (Index k = 0; k < steps_.pairs; ++k, pair.advance()) {
        const Operand<S> row = operand(task, which, pair, k);
        for (Index c = 0; c < count; c += lanes, to += lanes) operand_tile(row, c, count).store(to);
      }
    }
    for (Index p = 0; p < task.count; ++p) {
      const Plane& plane = task.planes[p];
      for (const Product& product : plane.products) {
        const Range mine = split(product.to ? plane.units : 0, task.thread, task.threads);
        for (Index row = mine.begin; row < mine.end; ++row)
          one_row(plane, product, task.slot + columns_at_[product.operand], row);
      }
      const Range mine = split(plane.bias ? plane.vectors() : 0, task.thread, task.threads);
      for (Index v = mine.begin; v < mine.end; ++v)
        add_biases<1>(task, plane, v, plane.rows + v * lanes, plane.width);
    }
  }

  // Computes and writes a row of a gradient once.
  void one_row(const Plane& plane, const Product& product, const C* operand, Index row) const {
    const Index width = ceil_div(product.columns, lanes) * lanes;
    S* to = product.to + row * product.columns;
    for (Index column = 0; column < product.columns; column += lanes) {
      V sum(0);
      for (Index k = 0; k < steps_.pairs; ++k)
        sum = fma(V(plane.rows[k * plane.width + row]), V::load(operand + k * width + column), sum);
      store_units(sum, to + column, product.columns - column);
    }
  }

  const Layer& layer_;
  const CellShape& shape_;
  const Steps& steps_;
  const Index Hp_, Op_, saved_width_;
  bool keeps_sums_ = false;  // there are several blocks of pairs; else a panel's, of each thread
  C *sums_ = nullptr, *bias_sums_ = nullptr, *slots_ = nullptr;
  Index sums_slot_ = 0, slot_ = 0, columns_at_[kOperands] = {};  // elements
};

}  // namespace fastrnn::FASTRNN_ISA
