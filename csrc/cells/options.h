// What options add to the step of any cell. Scalars of a row (means, scales) are the device's to
// compute; the formulas stand here.
//
//   zoneout     h_t = keep ? h_{t−1} : h', or, of a share p, p·h_{t−1} + (1 − p)·h'; likewise c
//               (Krueger et al. 2017)
//   layer norm  y = (x − mean)·scale over the n values of a row, scale = 1 / √(variance + ε), and
//               then γ·y + β (Ba, Kiros & Hinton 2016). Gradient, with g = γ·d(γ·y + β):
//               dx = scale·(g − mean(g) − y·mean(g·y))
//   grad clip   the gradients of h and c at a step, held between ±limit (Graves 2013)
//
// V brings, beside what activation.h asks for, choose(condition, a, b) = condition > 0 ? a : b.
#pragma once

#include "activation.h"

namespace fastrnn {

// Planes of saved values that layer norm adds to a cell's: y of the sums of x and of h, and the
// scalars of a row.
FASTRNN_CELL int norm_planes(const CellOptions& o, int gates) {
  return o.layer_norm ? 2 * gates + 1 : 0;
}
inline constexpr double kNormEpsilon = 1e-5;
// The place of each scalar in the last plane.
enum NormScalar { kScaleX, kScaleH, kScaleSecond, kMeanC, kScaleC };

template <class V>
FASTRNN_CELL V normalize(V x, V mean, V scale) {
  return (x - mean) * scale;
}

template <class V>
FASTRNN_CELL V normalize_backward(V g, V y, V scale, V mean_g, V mean_gy) {
  return scale * (g - mean_g - y * mean_gy);
}

// The share `keep` of the old value.
template <class V>
FASTRNN_CELL V zoneout_mean(V keep, V old_value, V new_value) {
  return fma(keep, old_value, (V(1) - keep) * new_value);
}

template <class V>
FASTRNN_CELL V clamp(V x, V limit) {
  return minimum(maximum(x, V(0) - limit), limit);
}

}  // namespace fastrnn
