// The active rows of a step and the addresses of their values: csrc/steps.h for kernels, and the
// arrays of one pass of a persistent kernel.
#pragma once

#include "persistent/words.h"

namespace fastrnn::persistent {

// The table of steps on the device. Each pointer may be null: a full batch.
struct StepTable {
  int T = 0, B = 0;
  const std::int64_t* active = nullptr;    // [T] rows active at the step, a prefix; null: B
  const std::int64_t* offset = nullptr;    // [T] null: t·B
  const std::int64_t* position = nullptr;  // [T] null: t
  const std::int64_t* order = nullptr;     // [B] the caller's row; null: i
  const std::uint8_t* fresh = nullptr;     // [N] an episode starts at the pair's step; null: none

  FASTRNN_HOST_DEVICE bool is_active(int t, int i) const {
    return t >= 0 && t < T && (!active || i < active[t]);
  }
  FASTRNN_HOST_DEVICE std::int64_t row(int i) const { return order ? order[i] : i; }
  // Its number, as the arrays of pairs have it: in the caller's order of rows.
  FASTRNN_HOST_DEVICE std::int64_t pair(int t, int i) const {
    return (offset ? offset[t] : static_cast<std::int64_t>(t) * B) + row(i);
  }
  // Nothing crosses from the step before into row i at step t.
  FASTRNN_HOST_DEVICE bool starts_fresh(int t, int i, bool reverse) const {
    const int boundary = reverse ? t + 1 : t;
    return fresh && is_active(boundary, i) && fresh[pair(boundary, i)];
  }
};

// Element (t, row i, unit u) of group g at data[g·group + position(t)·step + order(i)·row + u].
template <class T>
struct SequenceOf {
  T* data = nullptr;
  std::int64_t group = 0, step = 0, row = 0;

  FASTRNN_HOST_DEVICE T* at(const StepTable& steps, int g, int t, int i, int u) const {
    const std::int64_t position = steps.position ? steps.position[t] : t;
    return data + g * group + position * step + steps.row(i) * row + u;
  }
};

// Element (pair n, plane p, unit u) of group g at data[g·group + n·row + p·plane + u].
template <class T>
struct PlanesOf {
  T* data = nullptr;
  std::int64_t group = 0, row = 0, plane = 0;

  FASTRNN_HOST_DEVICE T* at(int g, std::int64_t n, int p, int u) const {
    return data + g * group + n * row + p * plane + u;
  }
};

// Element (row i, unit u) of group g at data[g·group + order(i)·row + u].
template <class T>
struct StateOf {
  T* data = nullptr;
  std::int64_t group = 0, row = 0;

  FASTRNN_HOST_DEVICE T* at(const StepTable& steps, int g, int i, int u) const {
    return data + g * group + steps.row(i) * row + u;
  }
};

// The states that a block carries from step to step, in shared memory: [state][pass][item][thread].
struct CarriedStates {
  float* values;
  int passes, items;

  FASTRNN_HOST_DEVICE float& at(int state, int pass, int item, int thread) const {
    return values[((state * passes + pass) * items + item) * kThreads + thread];
  }
};

}  // namespace fastrnn::persistent
