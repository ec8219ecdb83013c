// The rows that run at each step, for kernels: padded, `lengths`, PackedSequence and `reset`, with
// the meaning of csrc/steps.h but without its sorting: rows keep the caller's order, and an
// inactive row does nothing at a step.
//
// The host is not involved: kernels read `lengths` and `reset` in place, on the device, and clamp
// lengths to 0…T. For packed data batch_sizes is on the host and is passed as kernel arguments
// (PackedTable): under graph capture nothing points to host memory, and nothing synchronises.
//
// A (step, row) pair has the index n = t·B + i; for packed data offset[t] + i. Arrays of the caller
// and of the engine use this order.
#pragma once

#include "kernel.h"
#include "problem.h"

namespace fastrnn::cuda {

struct Rows {
  Index T = 0, B = 0;
  Index pairs = 0;                        // T·B, or the packed rows
  const std::int64_t* lengths = nullptr;  // [B], the caller's
  const Index* offset = nullptr;          // [T], only for packed data
  const Index* packed_length = nullptr;   // [B], only for packed data
  const bool* reset = nullptr;
  Index reset_step = 0, reset_row = 0;

  FASTRNN_CELL bool packed() const { return offset != nullptr; }
  FASTRNN_CELL Index length(Index i) const {
    if (packed_length) return packed_length[i];
    if (!lengths) return T;
    return greatest(0, least(lengths[i], T));
  }
  FASTRNN_CELL bool active(Index t, Index i) const { return t < length(i); }
  FASTRNN_CELL Index pair(Index t, Index i) const { return (offset ? offset[t] : t * B) + i; }

  // The step and row of a pair.
  FASTRNN_CELL void find(Index n, Index& t, Index& i) const {
    if (!offset) {
      t = n / B;
      i = n % B;
      return;
    }
    Index low = 0, high = T;  // the last step whose offset is at most n
    while (high - low > 1) {
      const Index middle = (low + high) / 2;
      (offset[middle] <= n ? low : high) = middle;
    }
    t = low;
    i = n - offset[low];
  }

  template <class S>
  FASTRNN_CELL S* at(const Sequence& a, Index t, Index i) const {
    return static_cast<S*>(a.data) + (offset ? pair(t, i) * a.row : t * a.step + i * a.row);
  }
};

// The kind of a row's state before a step.
enum class Entry { none, zeros, initial, carried };

// The steps in the order of one direction.
struct Walk {
  const Rows& rows;
  bool reverse;

  FASTRNN_CELL Index step(Index s) const { return reverse ? rows.T - 1 - s : s; }
  FASTRNN_CELL Index previous(Index t) const { return reverse ? t + 1 : t - 1; }
  FASTRNN_CELL Index following(Index t) const { return reverse ? t - 1 : t + 1; }
  FASTRNN_CELL Index first_step(Index i) const { return reverse ? rows.length(i) - 1 : 0; }
  FASTRNN_CELL bool last(Index t, Index i) const { return t == (reverse ? 0 : rows.length(i) - 1); }
  // Whether an episode starts here: the state before step t is zeros, independently of earlier
  // steps.
  FASTRNN_CELL bool starts_fresh(Index t, Index i) const {
    if (!rows.reset) return false;
    const Index boundary = reverse ? t + 1 : t;
    return boundary < rows.length(i) && rows.reset[boundary * rows.reset_step + i * rows.reset_row];
  }
  FASTRNN_CELL Entry entry(Index t, Index i) const {
    if (!rows.active(t, i)) return Entry::none;
    if (starts_fresh(t, i)) return Entry::zeros;
    return t == first_step(i) ? Entry::initial : Entry::carried;
  }
  // Whether step t+1 contributes no gradient: it belongs to another episode, or does not exist.
  FASTRNN_CELL bool cut_after(Index t, Index i) const {
    return last(t, i) || starts_fresh(following(t), i);
  }
};

// Writes `offset` and `packed_length` from batch sizes, kSteps steps at a time.
struct PackedTable {
  static constexpr const char* name = "packed rows";
  static constexpr int kSteps = 400;
  Index first, steps;      // the range of the sizes
  Index before;            // rows before step `first`
  Index size[kSteps + 1];  // the last: of the step after the range; 0 after the end
  Index* offset;
  Index* length;

  FASTRNN_CELL Index count() const { return steps; }
  FASTRNN_CELL void element(Index j) const {
    Index sum = before;
    for (Index k = 0; k < j; ++k) sum += size[k];
    offset[first + j] = sum;
    for (Index i = size[j + 1]; i < size[j]; ++i) length[i] = first + j + 1;
  }
};

inline void write_packed_table(void* stream, const std::int64_t* batch_sizes, Index T,
                               Index* offset, Index* length) {
  Index before = 0;
  for (Index first = 0; first < T; first += PackedTable::kSteps) {
    PackedTable table{};
    table.first = first;
    table.steps = least(PackedTable::kSteps, T - first);
    table.before = before;
    for (Index j = 0; j <= table.steps; ++j)
      table.size[j] = first + j < T ? batch_sizes[first + j] : 0;
    for (Index j = 0; j < table.steps; ++j) before += table.size[j];
    table.offset = offset;
    table.length = length;
    launch_elements(stream, table);
  }
}

}  // namespace fastrnn::cuda
