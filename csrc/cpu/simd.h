// The SIMD value of one instruction set: Vec<float> and Vec<double> over the compiler's vector
// extensions. Each isa_*.cpp defines, before it includes this:
//   FASTRNN_ISA            its namespace, so that no two sets share a symbol
//   FASTRNN_VECTOR_BYTES   the width of a register
//   FASTRNN_REGISTERS      how many there are
// No std template is used below here: an inline function compiled for one set must never be the
// copy that the linker keeps for another.
#pragma once

#include <cstdint>

#include "../problem.h"
#include "../steps.h"
#include "../storage.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// For what a kernel does once per tile: one function, not a copy in each of its variants.
#define FASTRNN_NOINLINE __attribute__((noinline))
// A lambda that takes accumulators must be inlined, or these go through memory.
#define FASTRNN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastrnn::FASTRNN_ISA {

using Index = std::int64_t;

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
  using type = std::int64_t;
};

template <class T>
struct Vec {
  static constexpr int lanes = FASTRNN_VECTOR_BYTES / sizeof(T);
  using Integer = typename IntegerOf<T>::type;
  typedef T Native __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  typedef T Unaligned
      __attribute__((vector_size(FASTRNN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
  typedef Integer Bits __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));

  Native v;

  Vec() = default;
  FASTRNN_INLINE Vec(Native x) : v(x) {}
  FASTRNN_INLINE explicit Vec(double x) : v(static_cast<T>(x) - Native{}) {}
  FASTRNN_INLINE explicit Vec(float x) : v(static_cast<T>(x) - Native{}) {}
  FASTRNN_INLINE explicit Vec(int x) : v(static_cast<T>(x) - Native{}) {}

  static FASTRNN_INLINE Vec load(const T* p) { return Vec(*reinterpret_cast<const Unaligned*>(p)); }
  FASTRNN_INLINE void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }
};

#define FASTRNN_OPERATOR(op)                              \
  template <class T>                                      \
  FASTRNN_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) { \
    return Vec<T>(a.v op b.v);                            \
  }
FASTRNN_OPERATOR(+)
FASTRNN_OPERATOR(-)
FASTRNN_OPERATOR(*)
FASTRNN_OPERATOR(/)
#undef FASTRNN_OPERATOR

// a·b + c, with one rounding where the set has it. Written out, never left to the compiler's
// contraction: a sum must round the same way in every kernel.
template <class T>
FASTRNN_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
#if defined(__AVX512F__) && FASTRNN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm512_fmadd_ps(a.v, b.v, c.v));
  else
    return Vec<T>(_mm512_fmadd_pd(a.v, b.v, c.v));
#elif defined(__FMA__) && FASTRNN_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return Vec<T>(_mm256_fmadd_ps(a.v, b.v, c.v));
  else
    return Vec<T>(_mm256_fmadd_pd(a.v, b.v, c.v));
#elif defined(__aarch64__) && FASTRNN_VECTOR_BYTES == 16
  if constexpr (sizeof(T) == 4)
    return Vec<T>(vfmaq_f32(c.v, a.v, b.v));
  else
    return Vec<T>(vfmaq_f64(c.v, a.v, b.v));
#else
  return Vec<T>(a.v * b.v + c.v);
#endif
}

// Comparisons with NaN are false, so NaN in the first argument is returned.
template <class T>
FASTRNN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return Vec<T>(b.v > a.v ? b.v : a.v);
}
template <class T>
FASTRNN_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) {
  return Vec<T>(b.v < a.v ? b.v : a.v);
}
template <class T>
FASTRNN_INLINE Vec<T> positive(Vec<T> x) {
  return Vec<T>(x.v <= Vec<T>(0).v ? Vec<T>(0).v : Vec<T>(1).v);
}
template <class T>
FASTRNN_INLINE Vec<T> between(Vec<T> x, Vec<T> low, Vec<T> high) {
  using Bits = typename Vec<T>::Bits;
  const Bits inside = (Bits)(x.v > low.v) & (Bits)(x.v < high.v);
  return Vec<T>((typename Vec<T>::Native)(inside & (Bits)Vec<T>(1).v));
}
template <class T>
FASTRNN_INLINE typename Vec<T>::Bits sign_bit() {
  return (typename Vec<T>::Bits)Vec<T>(-0.0).v;
}
template <class T>
FASTRNN_INLINE Vec<T> absolute(Vec<T> x) {
  return Vec<T>((typename Vec<T>::Native)((typename Vec<T>::Bits)x.v & ~sign_bit<T>()));
}
template <class T>
FASTRNN_INLINE Vec<T> copy_sign(Vec<T> x, Vec<T> sign) {
  using Bits = typename Vec<T>::Bits;
  return Vec<T>(
      (typename Vec<T>::Native)(((Bits)x.v & ~sign_bit<T>()) | ((Bits)sign.v & sign_bit<T>())));
}

// e^x = 2^k·e^r, |r| ≤ ln 2 / 2, with e^r − 1 by its Taylor polynomial (degree 7 leaves a relative
// error of 1.5e-8 in float, degree 13 of 1.2e-17 in double). Cody and Waite's two-part ln 2.
template <class T>
struct Exponent {
  Vec<T> scale;      // 2^k
  Vec<T> remainder;  // e^r − 1
};

template <class T>
FASTRNN_INLINE Exponent<T> split_exponent(Vec<T> x) {
  using V = Vec<T>;
  using Bits = typename V::Bits;
  constexpr bool single = sizeof(T) == 4;
  const V magic(single ? 12582912.0 : 6755399441055744.0);  // 1.5·2^23, 1.5·2^52: rounds to integer
  const V shifted = fma(x, V(1.4426950408889634), magic);
  const V k = shifted - magic;
  V r = fma(k, V(single ? -0.693359375 : -0.693147180369123816490), x);
  r = fma(k, V(single ? 2.12194440e-4 : -1.90821492927058770002e-10), r);
  V p;
  if constexpr (single) {
    p = fma(r, V(1.0 / 5040), V(1.0 / 720));
  } else {
    p = fma(r, V(1.0 / 6227020800), V(1.0 / 479001600));
    p = fma(p, r, V(1.0 / 39916800));
    p = fma(p, r, V(1.0 / 3628800));
    p = fma(p, r, V(1.0 / 362880));
    p = fma(p, r, V(1.0 / 40320));
    p = fma(p, r, V(1.0 / 5040));
    p = fma(p, r, V(1.0 / 720));
  }
  p = fma(p, r, V(1.0 / 120));
  p = fma(p, r, V(1.0 / 24));
  p = fma(p, r, V(1.0 / 6));
  p = fma(p, r, V(0.5));
  p = fma(p * r, r, r);
  constexpr int mantissa = single ? 23 : 52;
  constexpr int bias = single ? 127 : 1023;
  const Bits exponent = (Bits)shifted.v - (Bits)magic.v + bias;
  return {V((typename V::Native)(exponent << mantissa)), p};
}

// e^x − 1 for x ≥ 0; saturates where e^x would overflow the scale.
template <class T>
FASTRNN_INLINE Vec<T> exp_minus_one(Vec<T> x) {
  const Exponent<T> e = split_exponent(minimum(x, Vec<T>(sizeof(T) == 4 ? 80.0 : 700.0)));
  return fma(e.scale, e.remainder, e.scale - Vec<T>(1));
}

// e^-x. Infinite where its inverse would not be a normal number, so that 1 / (1 + e^-x) is zero
// there; clamped at the other end, where 1 + e^-x is 1.
template <class T>
FASTRNN_INLINE Vec<T> exp_minus(Vec<T> x) {
  const Vec<T> limit(sizeof(T) == 4 ? 87.0 : 708.0), y = Vec<T>(0) - x;
  const Exponent<T> e = split_exponent(minimum(maximum(y, Vec<T>(0) - limit), limit));
  const Vec<T> value = fma(e.scale, e.remainder, e.scale);
  return Vec<T>(y.v > limit.v ? Vec<T>(__builtin_inf()).v : value.v);
}

// One value of N rows side by side, so that a cell's latencies overlap. Each operation is done to
// each row, with the same bits.
template <class C, int N>
struct Rows {
  Vec<C> of[N];

  Rows() = default;
  FASTRNN_INLINE explicit Rows(double x) {
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) of[r] = Vec<C>(x);
  }
};

#define FASTRNN_OPERATOR(op)                                                          \
  template <class C, int N>                                                           \
  FASTRNN_INLINE Rows<C, N> operator op(Rows<C, N> a, Rows<C, N> b) {                 \
    _Pragma("GCC unroll 8") for (int r = 0; r < N; ++r) a.of[r] = a.of[r] op b.of[r]; \
    return a;                                                                         \
  }
FASTRNN_OPERATOR(+)
FASTRNN_OPERATOR(-)
FASTRNN_OPERATOR(*)
FASTRNN_OPERATOR(/)
#undef FASTRNN_OPERATOR

#define FASTRNN_FUNCTION(name)                                                                  \
  template <class C, int N, class... More>                                                      \
  FASTRNN_INLINE Rows<C, N> name(Rows<C, N> a, const More&... more) {                           \
    _Pragma("GCC unroll 8") for (int r = 0; r < N; ++r) a.of[r] = name(a.of[r], more.of[r]...); \
    return a;                                                                                   \
  }
FASTRNN_FUNCTION(fma)
FASTRNN_FUNCTION(maximum)
FASTRNN_FUNCTION(minimum)
FASTRNN_FUNCTION(absolute)
FASTRNN_FUNCTION(copy_sign)
FASTRNN_FUNCTION(exp_minus_one)
FASTRNN_FUNCTION(exp_minus)
#undef FASTRNN_FUNCTION

// ---- storage types (csrc/storage.h) -----------------------------------------------------------

// A vector's worth of a 16-bit type.
typedef std::uint16_t Halves __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
typedef std::uint16_t UnalignedHalves
    __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2), aligned(2), may_alias));

// widen() and narrow() on whole vectors, to the same bits.
FASTRNN_INLINE Vec<float> widen_halves(Halves x, Bf16) {
  typedef std::uint32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  return Vec<float>((Vec<float>::Native)(__builtin_convertvector(x, Words) << 16));
}
FASTRNN_INLINE Halves narrow_halves(Vec<float> x, Bf16) {
  typedef std::uint32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  const Words bits = (Words)x.v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (Words)(x.v != x.v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), Halves);
}

#if defined(__AVX512F__) && FASTRNN_VECTOR_BYTES == 64
// With a full mask: without one, GCC 12 warns of the undefined vector in its own header.
FASTRNN_INLINE Vec<float> widen_halves(Halves x, F16) {
  return Vec<float>(_mm512_maskz_cvtph_ps(0xffff, (__m256i)x));
}
FASTRNN_INLINE Halves narrow_halves(Vec<float> x, F16) {
  return (Halves)_mm512_maskz_cvtps_ph(0xffff, x.v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__) && FASTRNN_VECTOR_BYTES == 32
FASTRNN_INLINE Vec<float> widen_halves(Halves x, F16) {
  return Vec<float>(_mm256_cvtph_ps((__m128i)x));
}
FASTRNN_INLINE Halves narrow_halves(Vec<float> x, F16) {
  return (Halves)_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__) && FASTRNN_VECTOR_BYTES == 16
FASTRNN_INLINE Vec<float> widen_halves(Halves x, F16) {
  return Vec<float>(vcvt_f32_f16((float16x4_t)x));
}
FASTRNN_INLINE Halves narrow_halves(Vec<float> x, F16) { return (Halves)vcvt_f16_f32(x.v); }
#else
FASTRNN_INLINE Vec<float> widen_halves(Halves x, F16) {
  Vec<float> wide;
  for (int i = 0; i < Vec<float>::lanes; ++i) wide.v[i] = widen(F16{x[i]});
  return wide;
}
FASTRNN_INLINE Halves narrow_halves(Vec<float> x, F16) {
  Halves halves;
  for (int i = 0; i < Vec<float>::lanes; ++i) {
    F16 half;
    narrow(x.v[i], &half);
    halves[i] = half.bits;
  }
  return halves;
}
#endif

// `count` units (at most a vector's) from storage; the lanes beyond are zero.
template <class C, class S>
FASTRNN_INLINE Vec<C> load_units(const S* p, Index count) {
  if (count >= Vec<C>::lanes) {
    if constexpr (sizeof(S) == sizeof(C))
      return Vec<C>::load(p);
    else
      return widen_halves(*reinterpret_cast<const UnalignedHalves*>(p), S{});
  }
  alignas(FASTRNN_VECTOR_BYTES) C lane[Vec<C>::lanes] = {};
  for (Index i = 0; i < count; ++i) lane[i] = widen(p[i]);
  return Vec<C>::load(lane);
}

template <class C, class S>
FASTRNN_INLINE void store_units(Vec<C> x, S* p, Index count) {
  if (count >= Vec<C>::lanes) {
    if constexpr (sizeof(S) == sizeof(C))
      return x.store(p);
    else
      *reinterpret_cast<UnalignedHalves*>(p) = narrow_halves(x, S{});
    return;
  }
  alignas(FASTRNN_VECTOR_BYTES) C lane[Vec<C>::lanes];
  x.store(lane);
  for (Index i = 0; i < count; ++i) narrow(lane[i], p + i);
}

// Rows that are not converted.
template <class T>
FASTRNN_INLINE void gather(T* to, const T* from, Index unit, Index count) {
  if (unit == 1)
    __builtin_memcpy(to, from, static_cast<std::size_t>(count) * sizeof(T));
  else
    for (Index u = 0; u < count; ++u) to[u] = from[u * unit];
}
template <class T>
FASTRNN_INLINE void scatter(T* to, const T* from, Index count) {
  gather(to, from, 1, count);
}

// The value as storage keeps it.
template <class S, class C>
FASTRNN_INLINE Vec<C> rounded(Vec<C> x) {
  if constexpr (sizeof(S) == sizeof(C))
    return x;
  else
    return widen_halves(narrow_halves(x, S{}), S{});
}

// `count` units, `unit` apart in storage, to compute type in a row, and back to a row of storage.
template <class C, class S>
FASTRNN_INLINE void gather(C* to, const S* from, Index unit, Index count) {
  Index u = 0;
  if (unit == 1)
    for (; u + Vec<C>::lanes <= count; u += Vec<C>::lanes)
      load_units<C>(from + u, Vec<C>::lanes).store(to + u);
  for (; u < count; ++u) to[u] = widen(from[u * unit]);
}
template <class C, class S>
FASTRNN_INLINE void scatter(S* to, const C* from, Index count) {
  Index u = 0;
  for (; u + Vec<C>::lanes <= count; u += Vec<C>::lanes)
    store_units(Vec<C>::load(from + u), to + u, Vec<C>::lanes);
  for (; u < count; ++u) narrow(from[u], to + u);
}

// Treats subnormal numbers as zero while it lives: recurrent states decay into them, and each costs
// a hundred cycles.
class FlushSubnormals {
#if defined(__x86_64__) || defined(_M_X64)
 public:
  FASTRNN_INLINE FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  FASTRNN_INLINE ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  FASTRNN_INLINE FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ | (std::uint64_t{1} << 24)));
  }
  FASTRNN_INLINE ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  std::uint64_t saved_;
#endif
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace fastrnn::FASTRNN_ISA
