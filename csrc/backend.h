// What a device provides: functions over one Problem. csrc/bind/ picks the table by the
// device of the arrays; csrc/cpu/ and cuda/ each define one and never see each other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "problem.h"

namespace fastrnn {

enum class Pass { forward, backward };

struct Backend {
  // Bytes of scratch the pass needs. Reads sizes, options, pointers for presence only.
  std::size_t (*workspace_size)(const Problem&, Pass);
  // Bytes of the stack's parameters in the order in which the device's kernels read them, and their
  // packing, which forward then need not do (`Problem::packed`). Both read options, dtype, I, H
  // and, for pack, parameters and threads; the result serves any T and B. Null where a device has
  // no packed weights.
  std::size_t (*packed_size)(const Problem&);
  void (*pack)(const Problem&, void* to);  // 64-byte aligned
  // The inverse of pack for int8: `packed` to the arrays of `parameters`. Null as above.
  void (*unpack)(const Problem&);
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
  // An ensemble: `count` problems, 1 or more, of equal options, sizes and threads, none of which
  // writes what another reads or writes. Runs the pass of each; the problems are divided among the
  // threads where that is faster than a team for each. A problem's results have the same bits as
  // alone. All use the first one's workspace, of ensemble_workspace_size() bytes. Null where a
  // device runs none.
  std::size_t (*ensemble_workspace_size)(const Problem*, std::int64_t count, Pass);
  void (*run_ensemble)(const Problem*, std::int64_t count, Pass);
};

const Backend& cpu_backend();
const Backend& cuda_backend();  // of builds with CUDA alone

// What the engine knows of a cell, for callers that size arrays by it.
struct CellTraits {
  int gates;         // rows of the weights, in units of H
  int states;        // 1: h; 2: h and c
  int saved_planes;  // of `Problem::saved`
};
// Throws std::invalid_argument where no such cell exists.
CellTraits cell_traits(const Options&);

}  // namespace fastrnn
