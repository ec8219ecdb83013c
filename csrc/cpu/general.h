// What the general path's two passes share: rows of planes and their norms, and zoneout.
//
// A row of planes holds values of each gate and hidden unit, [gate][Hp]. What lies beyond H in a
// plane is never part of a sum.
#pragma once

#include "../cells/options.h"
#include "tiling.h"

namespace fastrnn::FASTRNN_ISA {

// The first `count` lanes, zeros beyond.
template <class C>
FASTRNN_INLINE Vec<C> first_lanes(Vec<C> x, Index count) {
  if (count >= Vec<C>::lanes) return x;
  C lane[Vec<C>::lanes];
  x.store(lane);
  return load_units<C>(lane, count);
}

template <class C>
FASTRNN_INLINE C sum_lanes(Vec<C> x) {
  C lane[Vec<C>::lanes], sum = 0;
  x.store(lane);
  for (int i = 0; i < Vec<C>::lanes; ++i) sum += lane[i];
  return sum;
}

// The sum of value(offset) over the units of `planes` planes, always in the same order.
template <class C, class Value>
FASTRNN_INLINE C sum_planes(int planes, Index H, Value value) {
  const Index Hp = padded(H);
  Vec<C> total(0);
  for (Index plane = 0; plane < planes; ++plane)
    for (Index unit = 0; unit < H; unit += Vec<C>::lanes)
      total = total + first_lanes(value(plane * Hp + unit), H - unit);
  return sum_lanes(total);
}

FASTRNN_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FASTRNN_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <class C>
struct Moments {
  C mean, scale;
};

// Of a row of planes: its mean, and 1 / √(variance + ε).
template <class C>
FASTRNN_NOINLINE Moments<C> moments(const C* row, int planes, Index H) {
  using V = Vec<C>;
  const C count = static_cast<C>(planes * H);
  const C mean = sum_planes<C>(planes, H, [&](Index at) { return V::load(row + at); }) / count;
  const C variance = sum_planes<C>(planes, H,
                                   [&](Index at) {
                                     const V x = V::load(row + at) - V(mean);
                                     return x * x;
                                   }) /
                     count;
  return {mean, C(1) / square_root(variance + static_cast<C>(kNormEpsilon))};
}

// Normalises a row of planes in place, to scale·y + bias; y and its scale are kept where there is a
// place for them.
template <class C>
FASTRNN_NOINLINE void normalize_row(C* row, int planes, Index H, const C* gain, const C* bias,
                                    C* kept, C* kept_scale) {
  using V = Vec<C>;
  const Moments<C> m = moments(row, planes, H);
  for (Index at = 0; at < planes * padded(H); at += V::lanes) {
    const V y = normalize(V::load(row + at), V(m.mean), V(m.scale));
    fma(y, V::load(gain + at), V::load(bias + at)).store(row + at);
    if (kept) y.store(kept + at);
  }
  if (kept) *kept_scale = m.scale;
}

// The gradient of what was normalised, from that of gain·y + bias, whose planes lie where
// `d_planes` says, and on top of `d_gain` that of the gain. `to` may be d or y.
template <class C>
FASTRNN_NOINLINE void normalize_row_backward(C* to, const C* d, const int* d_planes, int planes,
                                             Index H, const C* gain, const C* y, C scale,
                                             C* d_gain) {
  using V = Vec<C>;
  const Index Hp = padded(H);
  V sum_g(0), sum_gy(0);
  for (int plane = 0; plane < planes; ++plane)
    for (Index unit = 0; unit < H; unit += V::lanes) {
      const Index at = plane * Hp + unit;
      const V g = V::load(gain + at) * V::load(d + d_planes[plane] * Hp + unit);
      sum_g = sum_g + first_lanes(g, H - unit);
      sum_gy = sum_gy + first_lanes(g * V::load(y + at), H - unit);
    }
  const C count = static_cast<C>(planes * H);
  const V mean_g(sum_lanes(sum_g) / count), mean_gy(sum_lanes(sum_gy) / count);
  for (int plane = 0; plane < planes; ++plane)
    for (Index unit = 0; unit < H; unit += V::lanes) {
      const Index at = plane * Hp + unit;
      const V d_sum = V::load(d + d_planes[plane] * Hp + unit), normal = V::load(y + at);
      fma(d_sum, normal, V::load(d_gain + at)).store(d_gain + at);
      normalize_backward(V::load(gain + at) * d_sum, normal, V(scale), mean_g, mean_gy)
          .store(to + at);
    }
}

// `planes` runs of `units` values of a vector of parameters to a row of planes; absent: zeros.
template <class S, class C>
void load_planes(C* to, const Weight& from, int planes, Index units) {
  const Index width = padded(units);
  for (Index plane = 0; plane < planes; ++plane)
    for (Index u = 0; u < width; ++u)
      to[plane * width + u] =
          from.data && u < units
              ? widen(static_cast<const S*>(from.data)[(plane * units + u) * from.unit])
              : C(0);
}

// Of one of the states, h or c.
template <class C>
class Zoneout {
  using V = Vec<C>;

 public:
  Zoneout(const Mask& mask, double share, Index units)
      : mask_(mask), share_(static_cast<C>(share)), units_(units) {}

  bool on() const { return mask_.data || share_ > 0; }
  // The pair's row of the mask; null where there is no mask.
  FASTRNN_INLINE const bool* row(const Steps& steps, Index d, Index t, Index i) const {
    if (!mask_.data) return nullptr;
    return mask_.data + d * mask_.group + steps.position[t] * mask_.step +
           steps.order[i] * mask_.row;
  }
  FASTRNN_INLINE V blend(const bool* row, Index unit, V old_value, V new_value) const {
    if (!row) return zoneout_mean(V(share_), old_value, new_value);
    return choose(kept(row, unit), old_value, new_value);
  }
  // A gradient's part that goes to the old value; the rest is the new value's.
  FASTRNN_INLINE void divide(const bool* row, Index unit, V d, V& d_old, V& d_new) const {
    d_old = row ? choose(kept(row, unit), d, V(0)) : V(share_) * d;
    d_new = row ? choose(kept(row, unit), V(0), d) : (V(1) - V(share_)) * d;
  }

 private:
  FASTRNN_INLINE V kept(const bool* row, Index unit) const {
    C lane[V::lanes] = {};
    for (Index u = 0; u < least(V::lanes, units_ - unit); ++u)
      lane[u] = row[(unit + u) * mask_.unit] ? C(1) : C(0);
    return V::load(lane);
  }

  Mask mask_;
  C share_;
  Index units_;
};

}  // namespace fastrnn::FASTRNN_ISA
