// Where the rows of a program's values are, and the instructions that compute each row from one
// other: reduce and collect.
//
// A chunk is the pairs of some steps and rows that run through a phase together. A value of its
// i-th step and j-th row is at base + i·step + j·row.
#pragma once

#include "functions.h"
#include "pack.h"
#include "program_plan.h"

namespace fastrnn::FASTRNN_ISA {

struct Chunk {
  Index t = 0, steps = 0, b = 0, rows = 0;
  Index pairs() const { return steps * rows; }
};

template <class C>
struct Place {
  C* base = nullptr;
  Index step = 0, row = 0;
  FASTRNN_INLINE C* at(Index i, Index j) const { return base + i * step + j * row; }
};

// body(row of to, row of from) for the pairs of a chunk.
template <class C, class Body>
FASTRNN_INLINE void each_pair(const Chunk& chunk, const Place<C>& to, const Place<C>& from,
                              Body body) {
  for (Index i = 0; i < chunk.steps; ++i)
    for (Index j = 0; j < chunk.rows; ++j) body(to.at(i, j), from.at(i, j));
}

// ---- reduce -------------------------------------------------------------------------------------

template <bool Maximum>
struct Merge {
  template <class C>
  static FASTRNN_INLINE Vec<C> vectors(Vec<C> a, Vec<C> b) {
    return Maximum ? larger(a, b) : a + b;
  }
  template <class C>
  static FASTRNN_INLINE C numbers(C a, C b) {
    if constexpr (Maximum)
      return b > a || b != b ? b : a;
    else
      return a + b;
  }
  template <class C>
  static FASTRNN_INLINE C start() {
    return Maximum ? C(-__builtin_inf()) : C(0);
  }
};

// n contiguous elements: by vectors, then the lanes of the sum.
template <class M, class C>
FASTRNN_INLINE C reduce_side_by_side(const C* x, Index n) {
  using V = Vec<C>;
  V all(M::template start<C>());
  Index j = 0;
  for (; j + V::lanes <= n; j += V::lanes) all = M::vectors(all, V::load(x + j));
  if (j < n) {
    alignas(FASTRNN_VECTOR_BYTES) C lane[V::lanes];
    V(M::template start<C>()).store(lane);
    for (Index i = j; i < n; ++i) lane[i - j] = x[i];
    all = M::vectors(all, V::load(lane));
  }
  return merge_lanes(all, [](C a, C b) { return M::numbers(a, b); });
}

template <class M, class C>
FASTRNN_INLINE void reduce_row(const Reduce& r, C* to, const C* from, const Range& outputs) {
  using V = Vec<C>;
  Index g = outputs.begin;
  if (r.element == 1) {
    for (; g < outputs.end; ++g) to[g] = reduce_side_by_side<M>(from + g * r.segment, r.n);
    return;
  }
  if (r.segment == 1)  // a vector of outputs at once, each in the order of one alone
    for (; g + V::lanes <= outputs.end; g += V::lanes) {
      V all(M::template start<C>());
      for (Index j = 0; j < r.n; ++j) all = M::vectors(all, V::load(from + g + j * r.element));
      all.store(to + g);
    }
  for (; g < outputs.end; ++g) {
    C all = M::template start<C>();
    for (Index j = 0; j < r.n; ++j) all = M::numbers(all, from[g * r.segment + j * r.element]);
    to[g] = all;
  }
}

// The mean of value(j, lanes) over n contiguous elements: four sums of vectors, then their lanes.
template <class C, class Value>
FASTRNN_INLINE C mean_of(Index n, Value value) {
  using V = Vec<C>;
  constexpr int lanes = V::lanes, most = 4;
  V sum[most] = {V(0), V(0), V(0), V(0)};
  Index j = 0;
  for (; j + most * lanes <= n; j += most * lanes)
#pragma GCC unroll 4
    for (int k = 0; k < most; ++k) sum[k] = sum[k] + value(j + k * lanes, Index{lanes});
  for (; j < n; j += lanes) sum[0] = sum[0] + value(j, n - j);
  return merge_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]), [](C a, C b) { return a + b; }) /
         static_cast<C>(n);
}

// x − mean of a row's last elements, 0 beyond them.
template <class C>
FASTRNN_INLINE Vec<C> centred_first(const C* x, C mean, Index count) {
  alignas(FASTRNN_VECTOR_BYTES) C lane[Vec<C>::lanes] = {};
  for (Index i = 0; i < count; ++i) lane[i] = x[i] - mean;
  return Vec<C>::load(lane);
}

template <class C>
FASTRNN_INLINE void moments_of_row(C* to, const C* x, Index n) {
  using V = Vec<C>;
  const auto value = [&](Index j, Index left)
                         FASTRNN_INLINE_LAMBDA { return load_most(x + j, left); };
  const C mean = mean_of<C>(n, value);
  const auto squared = [&](Index j, Index left) FASTRNN_INLINE_LAMBDA {
    const V centred =
        left >= V::lanes ? V::load(x + j) - V(mean) : centred_first(x + j, mean, left);
    return centred * centred;
  };
  const C variance = mean_of<C>(n, squared);
  to[0] = mean;
  to[1] = C(1) / __builtin_sqrt(variance + static_cast<C>(kMomentsEpsilon));
}

template <class C>
FASTRNN_INLINE void means_of_row(C* to, const C* x, const C* y, Index n) {
  const auto value = [&](Index j, Index left)
                         FASTRNN_INLINE_LAMBDA { return load_most(x + j, left); };
  const auto product = [&](Index j, Index left) FASTRNN_INLINE_LAMBDA {
    return load_most(x + j, left) * load_most(y + j, left);
  };
  to[0] = mean_of<C>(n, value);
  to[1] = mean_of<C>(n, product);
}

template <class C>
FASTRNN_NOINLINE void run_norm(const Reduce& r, const Chunk& chunk, const Place<C>& to,
                               const Place<C>& from, const Place<C>& second) {
  for (Index i = 0; i < chunk.steps; ++i)
    for (Index j = 0; j < chunk.rows; ++j) {
      C* const out = to.at(i, j) + r.out.offset;
      const C* const in = from.at(i, j) + r.in.offset;
      if (r.kind == Reduce::Kind::moments)
        moments_of_row(out, in, r.n);
      else
        means_of_row(out, in, second.at(i, j) + r.second.offset, r.n);
    }
}

template <class C>
FASTRNN_NOINLINE void run_reduce(const Reduce& r, const Chunk& chunk, const Place<C>& to,
                                 const Place<C>& from, const Range& outputs) {
  each_pair(chunk, to, from, [&](C* out, const C* in) FASTRNN_INLINE_LAMBDA {
    if (r.kind == Reduce::Kind::maximum)
      reduce_row<Merge<true>>(r, out + r.out.offset, in + r.in.offset, outputs);
    else
      reduce_row<Merge<false>>(r, out + r.out.offset, in + r.in.offset, outputs);
  });
}

// ---- collect ------------------------------------------------------------------------------------

template <class C>
FASTRNN_INLINE void collect_piece(const Piece& piece, const CollectTable& table, C* to,
                                  const C* from, const Range& outputs) {
  using V = Vec<C>;
  const Index begin = most(piece.begin, outputs.begin);
  const Index end = least(piece.begin + piece.count, outputs.end);
  switch (piece.kind) {
    case Piece::Kind::zeros:
      for (Index i = begin; i < end; i += V::lanes) store_most(V(0), to + i, end - i);
      break;
    case Piece::Kind::copy:
      from += piece.from - piece.begin;
      if (end - begin == 1)
        to[begin] = from[begin];
      else
        for (Index i = begin; i < end; i += V::lanes)
          store_most(load_most(from + i, end - i), to + i, end - i);
      break;
    case Piece::Kind::sums:
      for (Index i = begin; i < end; ++i) {
        C sum = 0;
        for (Index at = table.starts[i]; at < table.starts[i + 1]; ++at)
          sum += from[table.indices[at]];
        to[i] = sum;
      }
      break;
  }
}

template <class C>
FASTRNN_NOINLINE void run_collect(const Collect& c, const CollectTable& table, const Chunk& chunk,
                                  const Place<C>& to, const Place<C>& from, const Range& outputs) {
  each_pair(chunk, to, from, [&](C* out, const C* in) FASTRNN_INLINE_LAMBDA {
    for (Index i = 0; i < table.pieces.count; ++i)
      collect_piece(table.pieces.data[i], table, out + c.out.offset, in + c.in.offset, outputs);
  });
}

}  // namespace fastrnn::FASTRNN_ISA
