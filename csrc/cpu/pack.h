// Packed weights: blocks of N vectors of outputs, each block holding its N vectors for k = 0 … K−1
// one after the other, which is the order in which accumulate() reads them.
//
//   gates     [block][k][tile][gate][lane]   from W [G·H, K]: outputs are hidden units
//   columns   [block][k][vector][lane]       from W [K, M]:   outputs are columns of W
//
// Outputs beyond the last are zero.
#pragma once

#include "gemm.h"

namespace fastrnn::FASTRNN_ISA {

FASTRNN_INLINE Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
FASTRNN_INLINE Index least(Index a, Index b) { return a < b ? a : b; }

// What a thread owns of `count` things when `threads` share them in runs.
struct Range {
  Index begin, end;
};
FASTRNN_INLINE Range split(Index count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Takes memory piece by piece; from nothing, it only counts.
class Arena {
 public:
  FASTRNN_INLINE explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  FASTRNN_INLINE T* take(Index count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  FASTRNN_INLINE std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// One block of gates first … first + gates − 1 of W, the hidden units from `unit` on.
template <class C, class S>
void pack_gates(C* to, const Weight& w, Index H, Index K, int first, int gates, int tiles,
                Index unit) {
  constexpr int lanes = Vec<C>::lanes;
  constexpr Index kRun = 16;  // steps of k at a time: reads stay in a line, writes in the cache
  const Index vectors = static_cast<Index>(tiles) * gates;
  for (Index k0 = 0; k0 < K; k0 += kRun) {
    const Index k1 = least(k0 + kRun, K);
    for (Index v = 0; v < vectors; ++v) {
      const Index gate = first + v % gates;
      for (int lane = 0; lane < lanes; ++lane) {
        const Index u = unit + v / gates * lanes + lane;
        C* out = to + v * lanes + lane;
        if (u >= H) {
          for (Index k = k0; k < k1; ++k) out[k * vectors * lanes] = C(0);
          continue;
        }
        const S* row = static_cast<const S*>(w.data) + (gate * H + u) * w.row;
        for (Index k = k0; k < k1; ++k) out[k * vectors * lanes] = widen(row[k * w.unit]);
      }
    }
  }
}

// One block of columns `first` … of the rows row … row + K − 1 of W [.., M].
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
