// The products of a program: rows by weights, by the micro-kernel of gemm.h.
//
// Weights    of each group in blocks of four vectors of outputs, the last of one, two or four:
//            [group][block][k][vector][lane]. Packed once in a call; or read in place (pack.h)
//            where there are too few rows to repay packing.
// Few rows   for one or two rows several blocks run side by side, to hide an addition's latency.
//
// A sum starts from `init`, and k runs in order: a result's bits depend neither on the rows beside
// it, nor on the thread that computes it, nor on where the weights are read.
#pragma once

#include "program_rows.h"

namespace fastrnn::FASTRNN_ISA {

// Where the weights of a product are read.
enum class Reading : std::uint8_t {
  packed,
  along_n,  // in place, blocks of whole vectors: the outputs' weights are side by side
  along_k,  // in place, a square at a time, transposed in registers
};

// All weights are read `uses` times, for `rows` rows each. Reading along n costs little more than
// packed weights do. To transpose them costs as much as to multiply three rows by them, and packing
// as much as `turns` transposes (docs/kernels-cpu.md).
template <class C>
FASTRNN_INLINE Reading choose_reading(const Product& p, Index uses, Index rows) {
  constexpr Index kFewUses = 4;
  if (p.w_n == 1)
    return uses * ceil_div(rows, rows_per_block(4)) <= kFewUses ? Reading::along_n
                                                                : Reading::packed;
  const Index bytes = p.G * p.N * p.K * static_cast<Index>(sizeof(C));
  const Index turns = bytes <= (1 << 18) ? 3 : bytes <= (1 << 20) ? 6 : 8;
  return p.w_k == 1 && uses * (3 + rows) <= 3 * turns ? Reading::along_k : Reading::packed;
}

// body(Int<N>{}) for the N vectors of a block: 4, 2 or 1; 3 take the room of 4.
template <class Body>
FASTRNN_INLINE void with_vectors(Index vectors, Body body) {
  if (vectors > 2)
    body(Int<4>{});
  else if (vectors == 2)
    body(Int<2>{});
  else
    body(Int<1>{});
}

// The weights of a product in blocks of outputs. An item is one block of one group.
template <class C>
struct Weights {
  using V = Vec<C>;
  static constexpr int lanes = V::lanes, wide = 4, block_outputs = wide * lanes;

  const Product& p;
  const C* matrix = nullptr;  // the caller's, at the product's offset
  C* packed = nullptr;
  Reading reading = Reading::packed;

  Index blocks() const { return ceil_div(p.N, block_outputs); }  // of a group
  Index last_vectors() const {
    const Index vectors = ceil_div(p.N - (blocks() - 1) * block_outputs, lanes);
    return vectors == 3 ? 4 : vectors;
  }
  Index items() const { return p.G * blocks(); }
  Index group_size() const { return ((blocks() - 1) * wide + last_vectors()) * lanes * p.K; }
  Index size() const { return p.G * group_size(); }

  struct Block {
    Index group, first;  // output
    int vectors;
    const C* data;
    Index step, next;  // to the weights of the next k, to the next block
  };
  // Whole blocks of a group are alike: `next` leads from one to the next.
  bool is_whole(Index b) const { return (b + 1) * block_outputs <= p.N; }
  Block block(Index item) const {
    const Index group = item / blocks(), b = item % blocks();
    if (reading == Reading::along_n && is_whole(b))
      return {group, b * block_outputs, wide, matrix + group * p.w_group + b * block_outputs,
              p.w_k, block_outputs};
    const int vectors = b + 1 < blocks() ? wide : static_cast<int>(last_vectors());
    return {group,           b * block_outputs,
            vectors,         packed + group * group_size() + b * block_outputs * p.K,
            vectors * lanes, block_outputs * p.K};
  }

  void pack(Index item) const {
    if (reading == Reading::along_k) return;
    if (reading == Reading::along_n && is_whole(item % blocks())) return;
    const Block at = block(item);
    C* const to = packed + (at.data - packed);
    Weight w;
    w.data = const_cast<C*>(matrix) + at.group * p.w_group;
    if (p.w_k == 1 && p.w_n != 1) {
      w.row = p.w_n;
      w.unit = 1;
      return pack_gates<C, C>(to, w, p.N, p.K, 0, 1, at.vectors, at.first);
    }
    w.row = p.w_k;
    w.unit = p.w_n;
    with_vectors(at.vectors, [&](auto n) FASTRNN_INLINE_LAMBDA {
      pack_columns<n.value, C, C>(to, w, 0, p.K, at.first, p.N);
    });
  }
};

// The rows of a product in a chunk, at the offsets of the product.
template <class C>
struct ProductRows {
  const C** in;
  C** out;
  const C** init;  // null: the sums start from zero
  Index count;
};

template <class C>
class RunProduct {
  using V = Vec<C>;
  using Block = typename Weights<C>::Block;
  static constexpr int lanes = V::lanes, wide = Weights<C>::wide;

 public:
  RunProduct(const Weights<C>& weights, const ProductRows<C>& rows)
      : p_(weights.p), weights_(weights), rows_(rows) {}

  // Blocks `items` of outputs of all groups.
  void over(const Range& items) {
    if (weights_.reading == Reading::along_k) return transposed(items);
    if (rows_.count == 1) return side_by_side<1, 6>(items);
    if (rows_.count == 2) return side_by_side<2, 3>(items);
    for (Index item = items.begin; item < items.end; ++item) {
      const Block at = weights_.block(item);
      with_vectors(at.vectors, [&](auto n) FASTRNN_INLINE_LAMBDA { all_rows<n.value>(at); });
    }
  }

 private:
  template <int N>
  FASTRNN_NOINLINE void all_rows(const Block& at) {
    constexpr int most = rows_per_block(N) > 12 ? 12 : rows_per_block(N);
    in_blocks_of_rows<most>(rows_.count, [&](auto count, Index first) FASTRNN_INLINE_LAMBDA {
      add<count.value, N, 1>(at, first);
    });
  }

  // Whole blocks of a group side by side, then a last one that is not whole.
  template <int R, int Most>
  void side_by_side(const Range& items) {
    constexpr int most = FASTRNN_REGISTERS == 32 ? Most : Most / 3;
    const Index blocks = weights_.blocks();
    for (Index item = items.begin; item < items.end;) {
      const Index end = least(items.end, item - item % blocks + blocks);
      const bool last = !weights_.is_whole((end - 1) % blocks);
      in_blocks_of_rows<most>(end - item - (last ? 1 : 0),
                              [&](auto count, Index first) FASTRNN_INLINE_LAMBDA {
                                add<R, wide, count.value>(weights_.block(item + first), 0);
                              });
      if (last) {
        const Block at = weights_.block(end - 1);
        with_vectors(at.vectors, [&](auto n) FASTRNN_INLINE_LAMBDA { add<R, n.value, 1>(at, 0); });
      }
      item = end;
    }
  }

  // By weights that are contiguous along k: the sums are in memory.
  void transposed(const Range& items) {
    constexpr int most = 8;  // rows
    for (Index item = items.begin; item < items.end; ++item) {
      const Block at = weights_.block(item);
      BlockInPlace block{};
      block.w.data = const_cast<C*>(weights_.matrix) + at.group * p_.w_group;
      block.w.row = p_.w_n;
      block.H = p_.N;
      block.gates = 1;
      block.unit = at.first;
      for (Index first = 0; first < rows_.count; first += most)
        add_transposed(block, at, first, least(most, rows_.count - first));
    }
  }

  FASTRNN_NOINLINE void add_transposed(const BlockInPlace& block, const Block& at, Index first,
                                       Index rows) {
    V sums[8 * wide];
    const C* x[8] = {};
    const Index column = at.group * p_.out_group + at.first, count = at.vectors;
    for (Index r = 0; r < rows; ++r) {
      x[r] = rows_.in[first + r] + at.group * p_.in_group;
      for (Index n = 0; n < count; ++n) {
        const Index left = p_.N - at.first - n * lanes;
        sums[r * count + n] = rows_.init && left > 0
                                  ? load_most(rows_.init[first + r] + column + n * lanes, left)
                                  : V(0);
      }
    }
    add_in_place<C, C>(sums, rows, count, x, p_.K, block);
    for (Index r = 0; r < rows; ++r)
      for (Index n = 0; n < count; ++n) {
        const Index left = p_.N - at.first - n * lanes;
        if (left > 0)
          store_most(sums[r * count + n], rows_.out[first + r] + column + n * lanes, left);
      }
  }

  // R rows from `first` on by M blocks of N vectors.
  template <int R, int N, int M>
  FASTRNN_NOINLINE void add(const Block& at, Index first) {
    const C* x[R];
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) x[r] = rows_.in[first + r] + at.group * p_.in_group;
    const Index column = at.group * p_.out_group + at.first;
    const bool whole = p_.N - at.first >= Index{M} * N * lanes;
    V acc[R][M * N];
    clear(acc);
    if (rows_.init) load_init(acc, first, column, at.first, whole);
    if constexpr (M == 1)
      accumulate<R, N>(acc, x, p_.K, at.data, at.step);
    else
      accumulate_blocks<R, N, M>(acc, x, at);
    const Sums<R, M * N, C> sums(acc);
    for (int r = 0; r < R; ++r) {
      C* to = rows_.out[first + r] + column;
      for (int n = 0; n < M * N; ++n) {
        const Index left = whole ? Index{lanes} : p_.N - at.first - n * lanes;
        if (left <= 0) break;
        store_most(sums.v[r][n], to + n * lanes, left);
      }
    }
  }

  template <int R, int N>
  FASTRNN_INLINE void load_init(V (&acc)[R][N], Index first, Index column, Index output,
                                bool whole) {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const C* from = rows_.init[first + r] + column;
#pragma GCC unroll 24
      for (int n = 0; n < N; ++n) {
        const Index left = whole ? Index{lanes} : p_.N - output - n * lanes;
        acc[r][n] = left > 0 ? load_most(from + n * lanes, left) : V(0);
      }
    }
  }

  template <int R, int N, int M>
  FASTRNN_INLINE void accumulate_blocks(V (&acc)[R][M * N], const C* const (&x)[R],
                                        const Block& at) const {
    const C* w = at.data;
    const Index step = at.step, next = at.next, K = p_.K;
    for (Index k = 0; k < K; ++k, w += step) {
      V row[R];
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) row[r] = V(x[r][k]);
#pragma GCC unroll 24
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 24
        for (int n = 0; n < N; ++n) {
          const V weight = V::load(w + m * next + n * lanes);
#pragma GCC unroll 24
          for (int r = 0; r < R; ++r) acc[r][m * N + n] = fma(row[r], weight, acc[r][m * N + n]);
        }
    }
  }

  const Product& p_;
  const Weights<C>& weights_;
  const ProductRows<C> rows_;
};

}  // namespace fastrnn::FASTRNN_ISA
