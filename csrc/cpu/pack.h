// Packed weights: blocks of N vectors of outputs, each block holding its N vectors for k = 0 … K−1
// one after the other, which is the order in which accumulate() reads them.
//
//   gates     [block][k][tile][gate][lane]   from W [G·H, K]: outputs are hidden units
//   columns   [block][k][vector][lane]       from W [K, M]:   outputs are columns of W
//
// Where a step of the kernel takes pairs of k, gates are [block][k / 2][tile][gate][lane][2].
// Outputs beyond the last are zero, and so is the k that an odd K lacks.
//
// A matrix that few rows are multiplied by is not packed: add_in_place() reads it along its rows,
// a square of lanes outputs by lanes k at a time, and transposes each square in registers. The sums
// are added in the order of accumulate(), so the bits are the same. One product costs about twice
// that of packed weights and half of packing them first.
#pragma once

#include <utility>

#include "gemm.h"

namespace fastrnn::FASTRNN_ISA {

FASTRNN_INLINE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
FASTRNN_INLINE Index least(Index a, Index b) { return a < b ? a : b; }
FASTRNN_INLINE Index most(Index a, Index b) { return a > b ? a : b; }

// A thread's part when `count` items are divided among `threads` in runs.
struct Range {
  Index begin, end;
};
FASTRNN_INLINE Range split(Index count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Takes blocks from the start of some memory, 64-byte aligned; a null base only counts the bytes.
class Arena {
 public:
  FASTRNN_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FASTRNN_INLINE T* take(Index count) {
    T* block = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return block;
  }
  FASTRNN_INLINE std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// Exchanges, between two rows of a square, the elements whose column has the bit `Stage` set or
// clear.
template <int Stage, class C, int... Column>
FASTRNN_INLINE void exchange(Vec<C>& upper, Vec<C>& lower, std::integer_sequence<int, Column...>) {
  constexpr int lanes = Vec<C>::lanes;
  const typename Vec<C>::Native a = upper.v, b = lower.v;
  upper.v = __builtin_shufflevector(a, b, (Column & Stage ? lanes + Column - Stage : Column)...);
  lower.v = __builtin_shufflevector(a, b, (Column & Stage ? lanes + Column : Column + Stage)...);
}

// Transposes a square of vectors in place, in log2(lanes) rounds of exchanges (Eklundh 1972).
template <class C, int Stage = Vec<C>::lanes / 2>
FASTRNN_INLINE void transpose(Vec<C> (&square)[Vec<C>::lanes]) {
  constexpr int lanes = Vec<C>::lanes;
  if constexpr (Stage > 0) {
#pragma GCC unroll 16
    for (int row = 0; row < lanes; ++row)
      if (!(row & Stage))
        exchange<Stage>(square[row], square[row + Stage], std::make_integer_sequence<int, lanes>{});
    transpose<C, Stage / 2>(square);
  }
}

// `K` columns, up to whole steps of the kernel.
template <class E>
FASTRNN_INLINE Index whole_steps(Index K) {
  return ceil_div(K, Factor<E>::depth) * Factor<E>::depth;
}

// A vector of row `row` of W from column k on, each lane the columns of one step of the kernel;
// zeros beyond column K.
template <class E, class S>
FASTRNN_INLINE typename Factor<E>::V weight_row(const Weight& w, Index row, Index k, Index K) {
  using V = typename Factor<E>::V;
  constexpr int columns = V::lanes * Factor<E>::depth;
  const S* from = static_cast<const S*>(w.data) + row * w.row + k * w.unit;
  V packed;
  if constexpr (Factor<E>::depth == 1) {
    if (w.unit == 1) return load_units<E>(from, K - k);
  } else if (w.unit == 1 && K - k >= columns) {
    __builtin_memcpy(&packed.v, from, sizeof(V));
    return packed;
  }
  E column[columns] = {};
  gather(column, from, w.unit, least(columns, K - k));
  __builtin_memcpy(&packed.v, column, sizeof(V));
  return packed;
}

// Packs one block of gates first … first + gates − 1 of W, the hidden units from `unit` on: squares
// of lanes units by lanes columns are read along W's rows and transposed.
template <class E, class S>
void pack_gates(E* to, const Weight& w, Index H, Index K, int first, int gates, int tiles,
                Index unit) {
  using V = typename Factor<E>::V;
  constexpr int lanes = V::lanes, depth = Factor<E>::depth;
  const Index vectors = static_cast<Index>(tiles) * gates, steps = ceil_div(K, depth);
  for (Index v = 0; v < vectors; ++v)
    for (Index step = 0; step < steps; step += lanes) {
      const Index gate = first + v % gates, begin = unit + v / gates * lanes;
      V square[lanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < lanes; ++lane)
        square[lane] =
            begin + lane < H ? weight_row<E, S>(w, gate * H + begin + lane, step * depth, K) : V(0);
      transpose(square);
      const Index count = least(lanes, steps - step);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        if (i < count)
          __builtin_memcpy(to + ((step + i) * vectors + v) * lanes * depth, &square[i].v,
                           sizeof(V));
    }
}

// One block of gates of a matrix that is not packed: `vectors` vectors of outputs, [tile][gate] as
// in a packed block.
struct BlockInPlace {
  Weight w;          // its rows are contiguous
  Index H;           // rows of a gate
  int first, gates;  // gates first … first + gates − 1
  Index unit;        // the block's first hidden unit
};

// A block of weights of storage type S as forward reads it: packed, or in place.
template <class E, class S>
struct BlockOfWeights {
  const E* packed;  // null: in place
  BlockInPlace in_place;
};

// Outputs whose weights are rows of W, for a few rows of operands: sums[r·stride] += x[r]·W.
template <class E>
struct OutputsInPlace {
  using C = typename Factor<E>::V;
  C* sums;
  Index stride;
  const E* const* x;
  Index rows;
};

// Adds the products by a square of W at (row, k), of which `outputs` rows are W's, transposed.
template <bool Whole, class E, class S>
FASTRNN_INLINE void add_square(const OutputsInPlace<E>& to, const Weight& w, Index row, Index k,
                               Index K, Index outputs) {
  using F = Factor<E>;
  using V = typename F::V;
  constexpr int lanes = V::lanes, depth = F::depth;
  V square[lanes];
#pragma GCC unroll 16
  for (int lane = 0; lane < lanes; ++lane)
    square[lane] = Whole || lane < outputs ? weight_row<E, S>(w, row + lane, k, K) : V(0);
  transpose(square);
  for (Index r = 0; r < to.rows; ++r) {
    const E* x = to.x[r] + k;
    V sum = to.sums[r * to.stride];
    if constexpr (Whole) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i)
        sum = F::multiply_add(F::broadcast(x + i * depth), F::weight(square[i]), sum);
    } else {
      const Index left = K - k;
      int i = 0;
      for (; i < lanes && (i + 1) * depth <= left; ++i)
        sum = F::multiply_add(F::broadcast(x + i * depth), F::weight(square[i]), sum);
      if constexpr (depth > 1)
        if (i < lanes && i * depth < left)
          sum = F::multiply_add(F::broadcast_last(x + i * depth), F::weight(square[i]), sum);
    }
    to.sums[r * to.stride] = sum;
  }
}

// What accumulate() adds to `rows` rows of `vectors` sums, by weights that are not packed.
template <class E, class S>
FASTRNN_NOINLINE void add_in_place(typename Factor<E>::V* sums, Index rows, Index vectors,
                                   const E* const* x, Index K, const BlockInPlace& block) {
  constexpr int lanes = Factor<E>::V::lanes, columns = lanes * Factor<E>::depth;
  Weight w = block.w;
  w.unit = 1;
  for (Index v = 0; v < vectors; ++v) {
    const Index unit = block.unit + v / block.gates * lanes, outputs = block.H - unit;
    if (outputs <= 0) break;
    const Index row = (block.first + v % block.gates) * block.H + unit;
    const OutputsInPlace<E> to{sums + v, vectors, x, rows};
    Index k = 0;
    if (outputs >= lanes)
      for (; k + columns <= K; k += columns) add_square<true, E, S>(to, w, row, k, K, outputs);
    for (; k < K; k += columns) add_square<false, E, S>(to, w, row, k, K, outputs);
  }
}

// Packs one block of columns, from `first` on, of the rows row … row + K − 1 of W [.., M].
template <int N, class C, class S>
void pack_columns(C* to, const Weight& w, Index row, Index K, Index first, Index M) {
  using V = Vec<C>;
  for (Index k = 0; k < K; ++k, to += N * V::lanes) {
    const S* from = static_cast<const S*>(w.data) + (row + k) * w.row;
    if (w.unit == 1) {
      for (int n = 0; n < N; ++n) {
        const Index column = first + n * V::lanes;
        load_units<C>(from + least(column, M), M - column).store(to + n * V::lanes);
      }
    } else {
      for (Index j = 0; j < N * V::lanes; ++j)
        to[j] = first + j < M ? C(widen(from[(first + j) * w.unit])) : C(0);
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
