// The functions of every cell for one storage type. Included by one unit for each type, so that
// they compile side by side.
#pragma once

#include "backward.h"
#include "cells/list.h"
#include "forward.h"

namespace fastrnn::cuda {

template <class Pass>
std::size_t scratch_of(const Layer& layer) {
  return Pass(layer, nullptr).used();
}

template <class Pass>
void run_pass(const Layer& layer) {
  Pass(layer, layer.scratch).run();
}

template <class Cell, class S>
constexpr LayerFunctions functions_of{scratch_of<Forward<Cell, S>>, scratch_of<Backward<Cell, S>>,
                                      run_pass<Forward<Cell, S>>, run_pass<Backward<Cell, S>>};

template <class S, class... Cells>
const LayerFunctions& functions(CellList<Cells...>, int cell) {
  static constexpr LayerFunctions table[] = {functions_of<Cells, S>...};
  return table[cell];
}

}  // namespace fastrnn::cuda
