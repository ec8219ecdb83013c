// Backward in parts of the steps (recompute.h).
#include "recompute.h"

#include <algorithm>

#include "team.h"

namespace fastrnn {
namespace {

// The states after step t, as rows of a kept sequence.
State state_after(const Steps& steps, const Sequence& a, std::int64_t t, std::size_t bytes) {
  return {shifted(a.data, steps.position[t] * a.step, bytes), 0, a.row, a.unit};
}

class Parts {
 public:
  Parts(const Stack& s, const Workspace& w) : s_(s), w_(w), length_(part_length(s)) {}

  void run(const Layer& whole) {
    const std::int64_t D = whole.directions, count = (s_.p.T + length_ - 1) / length_;
    for (std::int64_t d = 0; d < D; ++d) {
      Layer layer = one_direction(s_, whole, d);
      layer.part = true;
      share_input_gradient(whole, d, layer);
      layer.packed = w_.packed;
      run_layer(layer, s_.kernels.pack);
      for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t begin = (layer.reverse ? i : count - 1 - i) * length_;
        layer.starts_sums = i == 0;
        layer.ends_sums = i == count - 1;
        run_part(layer, begin, std::min(length_, s_.p.T - begin));
      }
    }
  }

 private:
  // dx is a sum over the directions: the first writes its part in compute type, and the second
  // adds to it.
  void share_input_gradient(const Layer& whole, std::int64_t d, Layer& layer) const {
    if (whole.directions == 1 || !(whole.d_below || whole.d_input.data)) return;
    void* between = whole.d_below ? whole.d_below : w_.d_input;
    if (d == 0) {
      layer.d_below = between;
      layer.d_input = {};
    } else {
      layer.d_input_before = between;
    }
  }

  void run_part(Layer layer, std::int64_t begin, std::int64_t count) {
    const Steps& all = s_.steps;
    const Steps steps = build_part(all, begin, count, w_.part_steps);
    const std::int64_t end = begin + count, first = all.offset[begin];
    const std::int64_t after = end < all.T ? all.active[end] : 0;
    const std::int64_t here = begin > 0 ? steps.B : 0;
    layer.steps = &steps;
    layer.rows_before = layer.reverse ? after : here;
    layer.rows_after = layer.reverse ? here : after;
    if (layer.rows_before > 0) {
      const std::int64_t t = layer.reverse ? end : begin - 1;
      layer.h_before = state_after(all, layer.output, t, s_.storage);
      layer.c_before = state_after(all, layer.cell, t, s_.compute);
    }
    layer.saved = w_.saved;
    run_layer(forward_again(layer), s_.kernels.forward);
    layer.consume_saved = true;
    layer.carry_h = w_.carry_h;
    layer.carry_c = w_.carry_c;
    layer.d_above = shifted(layer.d_above, first * layer.d_above_width, s_.compute);
    layer.d_below = shifted(layer.d_below, first * layer.I, s_.compute);
    layer.d_input_before = shifted(layer.d_input_before, first * layer.I, s_.compute);
    run_layer(layer, s_.kernels.backward);
  }

  // Only the saved values are needed: the other results go to scratch.
  Layer forward_again(Layer layer) const {
    layer.scratch = w_.again;
    layer.output = {w_.hidden, 0, s_.O, 1};
    layer.cell = {};
    layer.h_n = w_.h_n;
    layer.c_n = w_.c_n;
    return layer;
  }

  const Stack& s_;
  const Workspace& w_;
  const std::int64_t length_;
};

}  // namespace

void run_in_parts(const Stack& s, const Workspace& w, const Layer& layer) {
  Parts(s, w).run(layer);
}

}  // namespace fastrnn
