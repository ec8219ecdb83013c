// Quantisation to int8 with one scale per row: of weights, before they are packed. The kernels
// (cpu/int8.h) quantise operands by the same rule.
//
//   s = max|w| / 127, q = round(w · (127 / max|w|)), to nearest, ties to even, within ±127
//
// A row whose largest value is below 1e-30 counts as zeros; one with NaN or an infinity has the
// scale NaN and zeros.
#pragma once

#include <cstdint>
#include <cstring>

#include "problem.h"
#include "steps.h"

namespace fastrnn {

// 2^23 · 1.5: adding a number to it rounds that to an integer, in the low bits.
inline constexpr float kRounder = 12582912.0f;
inline constexpr float kLeastInt8 = 1e-30f;

// Scale and its inverse for a row whose largest absolute value is `most`.
struct Int8Scale {
  float scale, inverse;
};
FASTRNN_INLINE Int8Scale int8_scale(float most) {
  if (!(most <= __FLT_MAX__)) return {__builtin_nanf(""), 0};
  if (most < kLeastInt8) return {0, 0};
  return {most / 127.0f, 127.0f / most};
}

// Rows of K float32 at w, to contiguous rows q and a scale each.
FASTRNN_INLINE void quantize_rows(const Weight& w, std::int64_t rows, std::int64_t K,
                                  std::int8_t* q, float* scale) {
  for (std::int64_t row = 0; row < rows; ++row, q += K) {
    const float* from = static_cast<const float*>(w.data) + row * w.row;
    std::uint32_t most = 0;  // as bits, which for numbers of one sign are in the order of values
    for (std::int64_t k = 0; k < K; ++k) {
      std::uint32_t bits;
      std::memcpy(&bits, from + k * w.unit, sizeof(bits));
      bits &= 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    const Int8Scale s = int8_scale(largest);
    scale[row] = s.scale;
    for (std::int64_t k = 0; k < K; ++k)
      q[k] = s.inverse == 0 ? std::int8_t{0}
                            : static_cast<std::int8_t>(static_cast<std::int32_t>(
                                  from[k * w.unit] * s.inverse + kRounder - kRounder));
  }
}

}  // namespace fastrnn
