// The one micro-kernel: R rows times N vectors of outputs, all sums in registers.
//
//   acc[r][n] += Σ_k a(r, k) · w[k][n]           k = 0 … K−1, one after the other
//
// Operands are of compute type, or bfloat16 where the set multiplies pairs of them: then a step
// takes two neighbouring k, and a lane of weights holds both (Factor).
//
// It is vectorised over outputs and sequential over k, so a result's bits depend on neither the
// number of rows beside it nor the number of threads. Row counts below R run the same code with
// fewer rows. The weights of one k are N contiguous vectors; those of the next are `stride`
// further: packed, or in place where too few rows are multiplied by them to repay packing.
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

// Accumulators that leave registers for the weights and a broadcast.
constexpr int accumulators() { return FASTRNN_REGISTERS == 32 ? 24 : 12; }

// Rows that keep rows × vectors accumulators in registers.
constexpr int rows_per_block(int vectors) { return accumulators() / vectors; }

// body(Int<R>{}, first) over `rows` rows in as few blocks of at most MaxRows as possible, of about
// equal size: a block of one or two rows would be bound by reading the weights.
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

// The sums in memory, for use after the product. The address of an accumulator must never be taken,
// or the compiler keeps it in memory throughout.
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

// acc[r][n] = added(acc[r][n], r, n).
template <int R, int N, class C, class Added>
FASTRNN_INLINE void add_each(Vec<C> (&acc)[R][N], Added added) {
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n] = added(acc[r][n], r, n);
}

// What one step of the kernel multiplies: `depth` neighbouring k of a row, in every lane, by as
// many of each output's weights.
template <class E>
struct Factor {
  using V = Vec<E>;
  static constexpr int depth = 1;
  static FASTRNN_INLINE V weight(const E* p) { return V::load(p); }
  static FASTRNN_INLINE V weight(V bits) { return bits; }
  static FASTRNN_INLINE V broadcast(const E* p) { return V(*p); }
  static FASTRNN_INLINE V multiply_add(V x, V weight, V sum) { return fma(x, weight, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct Factor<Bf16> {
  using V = Vec<float>;
  using Pairs = __m512bh;  // GCC loads a vector of another type again at each use
  typedef __m512bh UnalignedPairs __attribute__((aligned(2), may_alias));
  static constexpr int depth = 2;
  static FASTRNN_INLINE Pairs weight(const Bf16* p) {
    return *reinterpret_cast<const UnalignedPairs*>(p);
  }
  static FASTRNN_INLINE Pairs weight(V bits) { return (Pairs)bits.v; }
  static FASTRNN_INLINE Pairs broadcast(const Bf16* p) {
    int pair;
    __builtin_memcpy(&pair, p, sizeof(pair));
    return (Pairs)_mm512_set1_epi32(pair);
  }
  // The k that has no neighbour, beside a zero.
  static FASTRNN_INLINE Pairs broadcast_last(const Bf16* p) {
    return (Pairs)_mm512_set1_epi32(p->bits);
  }
  static FASTRNN_INLINE V multiply_add(Pairs x, Pairs weight, V sum) {
    return V(_mm512_dpbf16_ps(sum.v, x, weight));
  }
};
#endif

// The factors of a product whose rows and weights are in storage S.
template <class S>
struct FactorOf {
  using type = typename ComputeOf<S>::type;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<Bf16> {
  using type = Bf16;
};
#endif

// One step: row r's x(r) by the N vectors of weights at w.
template <int R, int N, class E, class C, class Row>
FASTRNN_INLINE void add_step(Vec<C> (&acc)[R][N], const E* w, Row row) {
  using F = Factor<E>;
  decltype(F::weight(w)) weight[N];
#pragma GCC unroll 24
  for (int n = 0; n < N; ++n) weight[n] = F::weight(w + n * Vec<C>::lanes * F::depth);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    const auto x = row(r);
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n] = F::multiply_add(x, weight[n], acc[r][n]);
  }
}

// a(r, k) = rows[r][k].
template <int R, int N, class E, class C>
FASTRNN_INLINE void accumulate(Vec<C> (&acc)[R][N], const E* const* rows, Index K, const E* w,
                               Index stride = N * Vec<C>::lanes * Factor<E>::depth) {
  using F = Factor<E>;
  const E* a[R];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) a[r] = rows[r];
  Index k = 0;
  for (; k + F::depth <= K; k += F::depth, w += stride)
    add_step(acc, w, [&](int r) FASTRNN_INLINE_LAMBDA { return F::broadcast(a[r] + k); });
  if constexpr (F::depth > 1)
    if (k < K)
      add_step(acc, w, [&](int r) FASTRNN_INLINE_LAMBDA { return F::broadcast_last(a[r] + k); });
}

// a(r, k) = packed[k·width + r].
template <int R, int N, class C>
FASTRNN_INLINE void accumulate_packed(Vec<C> (&acc)[R][N], const C* packed, Index width, Index K,
                                      const C* w, Index stride) {
  for (Index k = 0; k < K; ++k, w += stride, packed += width)
    add_step(acc, w, [&](int r) FASTRNN_INLINE_LAMBDA { return Vec<C>(packed[r]); });
}

}  // namespace fastrnn::FASTRNN_ISA
