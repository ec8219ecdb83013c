// Loads and stores of a vector's first lanes, where a row ends inside a vector; reductions of
// lanes.
#pragma once

#include "simd.h"

namespace fastrnn::FASTRNN_ISA {

#if defined(__AVX2__) && FASTRNN_VECTOR_BYTES == 32
// All bits set in the first `bytes` bytes.
FASTRNN_INLINE __m256i first_bytes(Index bytes) {
  constexpr std::int32_t all = -1;
  static constexpr std::int32_t words[16] = {all, all, all, all, all, all, all, all};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + 8 - bytes / 4));
}
#endif

// The first `count` elements at p, zeros beyond; nothing beyond is read. 0 < count < lanes.
template <class C>
FASTRNN_INLINE Vec<C> load_first(const C* p, Index count) {
#if defined(__AVX512F__) && FASTRNN_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(C) == 4)
    return Vec<C>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), p));
  else
    return Vec<C>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), p));
#elif defined(__AVX2__) && FASTRNN_VECTOR_BYTES == 32
  const __m256i mask = first_bytes(count * static_cast<Index>(sizeof(C)));
  if constexpr (sizeof(C) == 4)
    return Vec<C>(_mm256_maskload_ps(p, mask));
  else
    return Vec<C>(_mm256_maskload_pd(p, mask));
#else
  return load_units<C>(p, count);
#endif
}

template <class C>
FASTRNN_INLINE void store_first(Vec<C> x, C* p, Index count) {
#if defined(__AVX512F__) && FASTRNN_VECTOR_BYTES == 64
  const unsigned mask = (1u << count) - 1;
  if constexpr (sizeof(C) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), x.v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(mask), x.v);
#elif defined(__AVX2__) && FASTRNN_VECTOR_BYTES == 32
  const __m256i mask = first_bytes(count * static_cast<Index>(sizeof(C)));
  if constexpr (sizeof(C) == 4)
    _mm256_maskstore_ps(p, mask, x.v);
  else
    _mm256_maskstore_pd(p, mask, x.v);
#else
  store_units(x, p, count);
#endif
}

template <class C>
FASTRNN_INLINE Vec<C> load_most(const C* p, Index count) {
  return count >= Vec<C>::lanes ? Vec<C>::load(p) : load_first(p, count);
}
template <class C>
FASTRNN_INLINE void store_most(Vec<C> x, C* p, Index count) {
  if (count >= Vec<C>::lanes)
    x.store(p);
  else
    store_first(x, p, count);
}

// Whether a comparison holds in some lane.
template <class T>
FASTRNN_INLINE bool any(typename Vec<T>::Bits mask) {
#if defined(__AVX512DQ__) && FASTRNN_VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__) && FASTRNN_VECTOR_BYTES == 32
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  typename Vec<T>::Integer all = 0;
  for (int i = 0; i < Vec<T>::lanes; ++i) all |= mask[i];
  return all != 0;
#endif
}

// Merges the lanes in halves: always in the same order.
template <class C, class Merge>
FASTRNN_INLINE C merge_lanes(Vec<C> x, Merge merge) {
  C lane[Vec<C>::lanes];
  x.store(lane);
#pragma GCC unroll 4
  for (int half = Vec<C>::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lane[i] = merge(lane[i], lane[i + half]);
  return lane[0];
}

}  // namespace fastrnn::FASTRNN_ISA
