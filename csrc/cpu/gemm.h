// The one micro-kernel: R rows times N vectors of outputs, all sums in registers.
//
//   acc[r][n] += Σ_k a(r, k) · w[k][n]           k = 0 … K−1, one after the other
//
// It is vectorised over outputs and sequential over k, so a result's bits depend on neither the
// number of rows beside it nor the number of threads. Row counts below R run the same code with
// fewer rows. The weights of one k are N vectors in a row; those of the next lie `stride` further:
// packed, so that they stream, or where they are, where they serve too few rows to repay packing.
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

template <int Value>
struct Int {
  static constexpr int value = Value;
};

// Vectors of outputs in one block of packed weights: as many tiles of all the gates as the register
// file takes.
constexpr int tiles_per_block(int gates) { return gates >= 3 ? 1 : 4 / gates; }

// Rows that keep rows × vectors accumulators, the weights and a broadcast in registers.
constexpr int rows_per_block(int vectors) {
  return FASTRNN_REGISTERS == 32 ? 24 / vectors : 12 / vectors;
}

// body(Int<R>{}, first) over `rows` rows in as few blocks as there can be of at most MaxRows, all
// of them about as large: a block of one or two rows would wait for the weights alone.
template <int MaxRows, class Body>
FASTRNN_INLINE void block_of_rows(Index rows, Index first, Body& body) {
  if constexpr (MaxRows > 0) {
    if (rows == MaxRows)
      body(Int<MaxRows>{}, first);
    else
      block_of_rows<MaxRows - 1>(rows, first, body);
  }
}
template <int MaxRows, class Body>
FASTRNN_INLINE void in_blocks_of_rows(Index rows, Body body) {
  Index first = 0;
  for (; rows - first >= 2 * MaxRows || rows - first == MaxRows; first += MaxRows)
    body(Int<MaxRows>{}, first);
  if (rows - first > MaxRows) {
    const Index half = (rows - first + 1) / 2;
    block_of_rows<MaxRows>(half, first, body);
    first += half;
  }
  block_of_rows<MaxRows>(rows - first, first, body);
}

template <int R, int N, class C>
FASTRNN_INLINE void clear(Vec<C> (&acc)[R][N]) {
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n] = Vec<C>(0);
}

// The sums in memory, for what is done with them afterwards. The accumulators themselves must never
// have their address taken, or the compiler keeps them there all along.
template <int R, int N, class C>
struct Sums {
  Vec<C> v[R][N];
  FASTRNN_INLINE explicit Sums(const Vec<C> (&acc)[R][N]) {
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
      for (int n = 0; n < N; ++n) v[r][n] = acc[r][n];
  }
};

// a(r, k) = rows[r][k].
template <int R, int N, class C>
FASTRNN_INLINE void accumulate(Vec<C> (&acc)[R][N], const C* const* rows, Index K, const C* w,
                               Index stride = N * Vec<C>::lanes) {
  using V = Vec<C>;
  const C* a[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  for (Index k = 0; k < K; ++k, w += stride) {
    V weight[N];
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) weight[n] = V::load(w + n * V::lanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const V x(a[r][k]);
#pragma GCC unroll 24
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, weight[n], acc[r][n]);
    }
  }
}

// a(r, k) = packed[k·R + r].
template <int R, int N, class C>
FASTRNN_INLINE void accumulate_packed(Vec<C> (&acc)[R][N], const C* packed, Index K, const C* w,
                                      Index stride) {
  using V = Vec<C>;
  for (Index k = 0; k < K; ++k, w += stride, packed += R) {
    V weight[N];
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) weight[n] = V::load(w + n * V::lanes);
#pragma GCC unroll 24
    for (int r = 0; r < R; ++r) {
      const V x(packed[r]);
#pragma GCC unroll 24
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, weight[n], acc[r][n]);
    }
  }
}

}  // namespace fastrnn::FASTRNN_ISA
