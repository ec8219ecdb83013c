// The table of one instruction set: every cell and storage type. Included last by each isa_*.cpp.
#pragma once

#include "../cells/list.h"
#include "backward.h"
#include "forward.h"
#include "roof.h"

namespace fastrnn::FASTRNN_ISA {

template <class Pass>
std::size_t scratch_of(const Layer& layer) {
  return Pass(layer, nullptr).used();
}

template <class Packing>
std::size_t packed_size(const Layer& layer) {
  return Packing(layer, nullptr).used();
}

template <class Packing>
void pack(const Layer& layer, int thread, int threads) {
  Packing(layer, layer.packed).run(thread, threads);
}

template <class Pass>
void run_pass(const Layer& layer, int thread, int threads) {
  Pass(layer, layer.scratch).run(thread, threads);
}

template <class Cell, class S>
constexpr LayerKernels kernels_of() {
  return {
      Shape<Cell, S>::lanes,         Shape<Cell, S>::rows,         Shape<Cell, S>::units,
      packed_size<Packing<Cell, S>>, scratch_of<Forward<Cell, S>>, scratch_of<Backward<Cell, S>>,
      pack<Packing<Cell, S>>,        run_pass<Forward<Cell, S>>,   run_pass<Backward<Cell, S>>};
}

template <class List>
struct Table;
template <class... Cells>
struct Table<CellList<Cells...>> {
  static constexpr LayerKernels kernels[][4] = {
      {kernels_of<Cells, float>(), kernels_of<Cells, double>(), kernels_of<Cells, Bf16>(),
       kernels_of<Cells, F16>()}...};
};

}  // namespace fastrnn::FASTRNN_ISA
