// Matrix products over many rows: to[m][n] (+)= Σ_k a(m, k)·b(n, k), accumulated in compute type.
//
// The library (library.h) computes them if it supports the strides, else the kernel below: a block
// owns 64 × 64 results, a thread 4 × 4 of them in registers, and k runs in tiles of 16 through
// shared memory, in order; long sums are accumulated in runs of 256. So a result's bits depend only
// on its own row and column. Several products of one shape are one launch.
#pragma once

#include <cmath>

#include "kernel.h"
#include "library.h"
#include "storage.h"

namespace fastrnn::cuda {

template <class S>
struct Matrices {
  using C = typename ComputeOf<S>::type;
  Index m, n, k;
  const S* a;
  Index a_m, a_k;  // strides
  const S* b;
  Index b_n, b_k;
  C* to;
  Index to_m;
  bool add;                                                   // add to the result, else overwrite
  Index batches = 1, a_batch = 0, b_batch = 0, to_batch = 0;  // the number, and strides
};

template <class S>
struct MatrixProduct {
  static constexpr const char* name = "matrix product";
  static constexpr int phases = 2;
  static constexpr int tile = 64, depth = 16, own = 4;
  using C = typename ComputeOf<S>::type;
  struct Shared {
    C a[depth][tile + 1], b[depth][tile + 1];
  };
  struct Registers {
    C sum[own][own], total[own][own];  // of the current run, of the previous runs
  };
  static constexpr int run_rounds = 16;
  static_assert(tile / own * (tile / own) == kThreads, "a thread owns a square of the tile");

  Matrices<S> p;

  Index blocks() const { return p.batches * tiles(); }
  FASTRNN_CELL Index tiles() const { return ceil_div(p.m, tile) * ceil_div(p.n, tile); }
  FASTRNN_CELL Index rounds() const { return greatest(1, ceil_div(p.k, depth)); }

  template <int phase>
  FASTRNN_CELL void run(Index block, int thread, Index round, Shared& shared,
                        Registers& mine) const {
    const Index across = ceil_div(p.n, tile);
    const Index batch = p.batches == 1 ? 0 : block / tiles();
    block -= batch * tiles();
    const Index m0 = block / across * tile, n0 = block % across * tile, k0 = round * depth;
    if constexpr (phase == 0) {
      load(shared.a, p.a + batch * p.a_batch, p.a_m, p.a_k, m0, p.m, k0, thread);
      load(shared.b, p.b + batch * p.b_batch, p.b_n, p.b_k, n0, p.n, k0, thread);
    } else {
      const int row = thread / (tile / own) * own, column = thread % (tile / own) * own;
      C(&sum)[own][own] = mine.sum;
      if (round == 0) clear(mine.total);
      if (round % run_rounds == 0) clear(sum);
      const int count = static_cast<int>(least(depth, p.k - k0));
      for (int k = 0; k < count; ++k) {
        FASTRNN_UNROLL
        for (int i = 0; i < own; ++i) FASTRNN_UNROLL
        for (int j = 0; j < own; ++j)
          sum[i][j] = std::fma(shared.a[k][row + i], shared.b[k][column + j], sum[i][j]);
      }
      const bool done = round + 1 == rounds();
      if (done || (round + 1) % run_rounds == 0) add(sum, mine.total);
      if (done) store(mine.total, p.to + batch * p.to_batch, m0 + row, n0 + column);
    }
  }

 private:
  FASTRNN_CELL static void clear(C (&sum)[own][own]) {
    for (int i = 0; i < own; ++i)
      for (int j = 0; j < own; ++j) sum[i][j] = 0;
  }

  FASTRNN_CELL static void add(const C (&sum)[own][own], C (&total)[own][own]) {
    for (int i = 0; i < own; ++i)
      for (int j = 0; j < own; ++j) total[i][j] += sum[i][j];
  }

  // Loads a tile; neighbouring threads read along the contiguous axis.
  FASTRNN_CELL void load(C (&to)[depth][tile + 1], const S* from, Index from_row, Index from_k,
                         Index row0, Index row_end, Index k0, int thread) const {
    for (int e = thread; e < tile * depth; e += kThreads) {
      const int k = from_k == 1 ? e % depth : e / tile;
      const int row = from_k == 1 ? e / depth : e % tile;
      const bool inside = row0 + row < row_end && k0 + k < p.k;
      to[k][row] = inside ? widen(from[(row0 + row) * from_row + (k0 + k) * from_k]) : C(0);
    }
  }

  FASTRNN_CELL void store(const C (&sum)[own][own], C* result, Index row, Index column) const {
    for (int i = 0; i < own; ++i)
      for (int j = 0; j < own; ++j) {
        if (row + i >= p.m || column + j >= p.n) continue;
        C* to = result + (row + i) * p.to_m + column + j;
        *to = p.add ? *to + sum[i][j] : sum[i][j];
      }
  }
};

template <class S>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<Bf16>() {
  return DType::bf16;
}
template <>
constexpr DType dtype_of<F16>() {
  return DType::f16;
}

template <class S>
AnyMatrices any(const Matrices<S>& p) {
  return {dtype_of<S>(), p.m,  p.n,    p.k,   p.a,       p.a_m,     p.a_k,     p.b,       p.b_n,
          p.b_k,         p.to, p.to_m, p.add, p.batches, p.a_batch, p.b_batch, p.to_batch};
}

template <class S>
void multiply(const Tools& tools, const Matrices<S>& p) {
  const LibraryProduct product(tools, any(p));
  if (product.usable())
    product.run(p.a, p.b, p.to);
  else
    launch(tools.stream, MatrixProduct<S>{p});
}

}  // namespace fastrnn::cuda
