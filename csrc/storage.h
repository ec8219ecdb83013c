// The storage types and their conversion to and from the compute type.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fastrnn {

struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

FASTRNN_CELL float as_float(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
#endif
}
FASTRNN_CELL std::uint32_t as_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
#endif
}

FASTRNN_CELL float widen(float x) { return x; }
FASTRNN_CELL double widen(double x) { return x; }
FASTRNN_CELL float widen(Bf16 x) { return as_float(static_cast<std::uint32_t>(x.bits) << 16); }
FASTRNN_CELL float widen(F16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  if (magnitude > 0x0f800000u) return as_float(sign | magnitude | 0x7fc00000u);  // NaN, made quiet
  if (magnitude == 0x0f800000u) return as_float(sign | 0x7f800000u);             // infinity
  if (magnitude < 0x00800000u)  // subnormal: 2^-14·(1 + m) − 2^-14, no subnormal float on the way
    return as_float(sign | as_bits(as_float(0x38800000u | magnitude) - as_float(0x38800000u)));
  return as_float(sign | (magnitude + 0x38000000u));
#endif
}

FASTRNN_CELL void narrow(float x, float* to) { *to = x; }
FASTRNN_CELL void narrow(double x, double* to) { *to = x; }
// Round to nearest, ties to even; NaN stays NaN.
FASTRNN_CELL void narrow(float x, Bf16* to) {
  const std::uint32_t bits = as_bits(x);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTRNN_CELL void narrow(float x, F16* to) {
#if defined(__CUDA_ARCH__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const std::uint32_t bits = as_bits(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x1ffu);  // NaN, made quiet
  } else if (magnitude >= 0x477ff000u) {            // rounds to 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the digits at the end
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  to->bits = static_cast<std::uint16_t>(sign | half);
#endif
}

}  // namespace fastrnn
