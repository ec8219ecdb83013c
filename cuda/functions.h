// The functions of every cell for one storage type. One translation unit for each type includes it,
// so that they compile in parallel.
#pragma once

#include "backward.h"
#include "cells/list.h"
#include "forward.h"
#include "persistent_layer.h"

namespace fastrnn::cuda {

// A placeholder for the passes of cells and types without persistent kernels.
struct NoPersistent {};

template <class Steps, class Persistent>
std::size_t scratch_of(const Layer& layer) {
  if constexpr (!std::is_same_v<Persistent, NoPersistent>)
    if (layer.plan) return Persistent(layer, nullptr).used();
  return Steps(layer, nullptr).used();
}

template <class Steps, class Persistent>
void run_pass(const Layer& layer) {
  if constexpr (!std::is_same_v<Persistent, NoPersistent>)
    if (layer.plan) return Persistent(layer, layer.scratch).run();
  Steps(layer, layer.scratch).run();
}

template <class Cell, class S, class PersistentF, class PersistentB>
constexpr LayerFunctions functions_with{
    scratch_of<Forward<Cell, S>, PersistentF>, scratch_of<Backward<Cell, S>, PersistentB>,
    run_pass<Forward<Cell, S>, PersistentF>, run_pass<Backward<Cell, S>, PersistentB>,
    persistent_sizes<Cell, S>};

template <class Cell, class S>
constexpr LayerFunctions functions_of() {
  if constexpr (has_persistent<Cell, S>)
    return functions_with<Cell, S, PersistentForward<Cell, S>, PersistentBackward<Cell, S>>;
  else
    return functions_with<Cell, S, NoPersistent, NoPersistent>;
}

template <class S, class... Cells>
const LayerFunctions& functions(CellList<Cells...>, int cell) {
  static constexpr LayerFunctions table[] = {functions_of<Cells, S>()...};
  return table[cell];
}

}  // namespace fastrnn::cuda
