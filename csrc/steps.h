// Which rows are active at each step. Padded, lengths, PackedSequence and reset all fill this one
// table, which is all that the engine knows of them.
//
// Rows are sorted by length, longest first (`order`), so that the rows active at a step are a
// prefix of length active[t]. A (step, row) pair has the flat number n = offset[t] + i, i being the
// sorted row. Engine buffers are indexed by n, the caller's arrays by position[t] and order[i]:
//   element (t, i, u) of a Sequence = data[position[t]·step + order[i]·row + u·unit].
// Packed data is the case position = offset, step = row, order = identity.
#pragma once

#include <algorithm>
#include <cstdint>

#include "problem.h"

#define FASTRNN_INLINE inline __attribute__((always_inline))

namespace fastrnn {

struct Steps {
  std::int64_t T = 0, B = 0;
  std::int64_t pairs = 0;            // N, the sum of active
  bool padding = false;              // some pair of the T·B grid is inactive
  std::int64_t* active = nullptr;    // [T] rows active at the step, not increasing
  std::int64_t* offset = nullptr;    // [T] sum of the active before the step; of a part [T + 1]
  std::int64_t* position = nullptr;  // [T] the step's place in the caller's arrays
  std::int64_t* order = nullptr;     // [B] the caller's row of each sorted row
  std::int64_t* length = nullptr;    // [B] steps of each sorted row
  std::int64_t* extent = nullptr;    // [B] the same, including steps after the end of a part
  // [N] or null. fresh[n]: an episode starts at the pair's step; no state comes from the step
  // before.
  std::uint8_t* fresh = nullptr;
};

// The steps in the order of one direction. Always inlined: no instruction set may use code that was
// compiled for another.
struct Walk {
  const Steps& steps;
  bool reverse;

  FASTRNN_INLINE std::int64_t step(std::int64_t s) const { return reverse ? steps.T - 1 - s : s; }
  FASTRNN_INLINE bool first(std::int64_t t, std::int64_t i) const {
    return reverse ? t == steps.length[i] - 1 : t == 0;
  }
  FASTRNN_INLINE bool last(std::int64_t t, std::int64_t i) const {
    return reverse ? t == 0 : t == steps.length[i] - 1;
  }
  FASTRNN_INLINE std::int64_t previous(std::int64_t t) const { return reverse ? t + 1 : t - 1; }
  FASTRNN_INLINE std::int64_t following(std::int64_t t) const { return reverse ? t - 1 : t + 1; }
  // An episode starts here: the state before step t is the reset state.
  FASTRNN_INLINE bool starts_fresh(std::int64_t t, std::int64_t i) const {
    if (!steps.fresh) return false;
    const std::int64_t boundary = reverse ? t + 1 : t;
    return boundary < steps.extent[i] && steps.fresh[steps.offset[boundary] + i];
  }
};

// Bytes that build_steps() takes from its scratch.
inline std::size_t steps_size(const Problem& p) {
  const std::size_t words = static_cast<std::size_t>(3 * p.T + 2 * p.B);
  const std::size_t flags = p.reset ? static_cast<std::size_t>(p.T * p.B) : 0;
  return words * sizeof(std::int64_t) + flags;
}

inline Steps build_steps(const Problem& p, void* scratch) {
  Steps s;
  s.T = p.T;
  s.B = p.B;
  s.active = static_cast<std::int64_t*>(scratch);
  s.offset = s.active + p.T;
  s.position = s.offset + p.T;
  s.order = s.position + p.T;
  s.length = s.extent = s.order + p.B;

  for (std::int64_t i = 0; i < p.B; ++i) s.order[i] = i;
  if (p.batch_sizes) {
    for (std::int64_t t = 0; t < p.T; ++t) s.active[t] = p.batch_sizes[t];
    for (std::int64_t i = 0, t = p.T; i < p.B; ++i) {
      while (t > 0 && p.batch_sizes[t - 1] <= i) --t;
      s.length[i] = t;
    }
  } else if (p.lengths) {
    std::stable_sort(s.order, s.order + p.B,
                     [&](std::int64_t a, std::int64_t b) { return p.lengths[a] > p.lengths[b]; });
    for (std::int64_t i = 0; i < p.B; ++i) s.length[i] = p.lengths[s.order[i]];
    for (std::int64_t t = 0, n = p.B; t < p.T; ++t) {
      while (n > 0 && s.length[n - 1] <= t) --n;
      s.active[t] = n;
    }
  } else {
    std::fill_n(s.length, p.B, p.T);
    std::fill_n(s.active, p.T, p.B);
  }
  for (std::int64_t t = 0; t < p.T; ++t) {
    s.offset[t] = s.pairs;
    s.position[t] = p.batch_sizes ? s.pairs : t;
    s.pairs += s.active[t];
  }
  s.padding = !p.batch_sizes && s.pairs < p.T * p.B;
  if (p.reset) {
    s.fresh = reinterpret_cast<std::uint8_t*>(s.length + p.B);
    for (std::int64_t t = 0; t < p.T; ++t)
      for (std::int64_t i = 0; i < s.active[t]; ++i)
        s.fresh[s.offset[t] + i] = p.reset[t * p.reset_step + s.order[i] * p.reset_row];
  }
  return s;
}

// Bytes that build_part() takes from its scratch, for a part of `count` steps.
inline std::size_t part_size(const Problem& p, std::int64_t count) {
  return static_cast<std::size_t>(count + 1 + 2 * p.B) * sizeof(std::int64_t);
}

// The `count` steps from `begin` on, for the rows that are active at `begin`; a part that begins at
// the first step has all rows. Pairs are numbered from the part's first on; positions and rows stay
// the caller's.
inline Steps build_part(const Steps& whole, std::int64_t begin, std::int64_t count, void* scratch) {
  Steps s = whole;
  const std::int64_t end = begin + count;
  s.T = count;
  if (begin > 0) s.B = whole.active[begin];
  s.padding = false;
  s.active = whole.active + begin;
  s.position = whole.position + begin;
  s.offset = static_cast<std::int64_t*>(scratch);
  s.length = s.offset + count + 1;
  s.extent = s.length + whole.B;
  const std::int64_t first = count > 0 ? whole.offset[begin] : 0;
  for (std::int64_t t = begin; t < end; ++t) s.offset[t - begin] = whole.offset[t] - first;
  s.pairs = (end < whole.T ? whole.offset[end] : whole.pairs) - first;
  s.offset[count] = s.pairs;
  for (std::int64_t i = 0; i < s.B; ++i) {
    s.extent[i] = std::max<std::int64_t>(whole.length[i] - begin, 0);
    s.length[i] = std::min(s.extent[i], count);
  }
  if (whole.fresh) s.fresh = whole.fresh + first;
  return s;
}

}  // namespace fastrnn
