// The limits of the machine on one instruction set: loops that do one kind of work and nothing
// else, with the vectors and the `fma` of the kernels.
//
// Arithmetic   acc[i] ← acc[i]·x + y in registers alone, with as many independent chains as a
//              micro-kernel has accumulators: enough to hide an operation's latency.
// Reading      acc[i] ← acc[i] + x[..] through an array again and again: the rate at which one
//              thread gets weights from the cache, or the memory, that holds them.
//
// Every loop returns the sum of its accumulators, which start from different values so that no two
// chains are the same. The caller must use the sum, or a compiler may drop the loop.
#pragma once

#include "layer.h"
#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

inline constexpr int kChains = FASTRNN_REGISTERS == 32 ? 24 : 12;
inline constexpr int kStreams = 8;

template <class C, int N>
FASTRNN_INLINE double sum_of(const Vec<C> (&acc)[N]) {
  Vec<C> sum(0);
#pragma GCC unroll 24
  for (int i = 0; i < N; ++i) sum = sum + acc[i];
  double total = 0;
  for (int lane = 0; lane < Vec<C>::lanes; ++lane) total += static_cast<double>(sum.v[lane]);
  return total;
}

template <class C>
double multiply_add(Index rounds) {
  using V = Vec<C>;
  const V x(0.5), y(0.25);  // towards 0.5: no subnormal, no infinity
  V acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = V(i);
  for (Index round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, y);
  }
  return sum_of(acc);
}

// Whole blocks of kStreams vectors; what is left over at the end of the array is not read.
inline double read_floats(const float* x, Index count, Index passes) {
  using V = Vec<float>;
  constexpr Index block = kStreams * V::lanes;
  V acc[kStreams];
#pragma GCC unroll 24
  for (int i = 0; i < kStreams; ++i) acc[i] = V(i);
  for (Index pass = 0; pass < passes; ++pass) {
    for (Index at = 0; at + block <= count; at += block) {
#pragma GCC unroll 24
      for (int i = 0; i < kStreams; ++i) acc[i] = acc[i] + V::load(x + at + i * V::lanes);
    }
  }
  return sum_of(acc);
}

template <class C>
constexpr MultiplyAdd multiply_add_of() {
  return {2 * kChains * Vec<C>::lanes, multiply_add<C>};
}

inline constexpr RoofLoops roof_loops = {{multiply_add_of<float>(), multiply_add_of<double>()},
                                         read_floats};

}  // namespace fastrnn::FASTRNN_ISA
