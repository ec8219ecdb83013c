// The kernels of one instruction set: a table of every cell and storage type. Included last by each
// isa_*.cpp.
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

template <class Weights>
std::size_t packed_size(const Layer& layer) {
  return Weights(layer, nullptr).used();
}

template <class Weights>
void pack(const Layer& layer, int thread, int threads) {
  Weights(layer, layer.packed).pack(thread, threads);
}

template <class Pass>
void run_pass(const Layer& layer, int thread, int threads) {
  Pass(layer, layer.scratch).run(thread, threads);
}

template <class Cell, class S>
struct KernelsOf {
  using K = Tiling<Cell, S>;
  static constexpr LayerKernels value = {K::lanes,
                                         Factor<typename K::E>::depth,
                                         K::rows,
                                         K::units,
                                         packed_size<ForwardWeights<Cell, S>>,
                                         scratch_of<Forward<Cell, S>>,
                                         scratch_of<Backward<Cell, S>>,
                                         pack<ForwardWeights<Cell, S>>,
                                         run_pass<Forward<Cell, S>>,
                                         run_pass<Backward<Cell, S>>};
};
template <class Cell>
struct KernelsOf<Cell, void> {
  static constexpr LayerKernels value = {};
};

// Storage types in the order of DType; void for one that another set serves.
template <class... Storages>
struct StorageList {};
using AllStorages = StorageList<float, double, Bf16, F16>;

template <class Cell, class... Storages>
constexpr CellKernels cell_kernels(StorageList<Storages...>) {
  return {{KernelsOf<Cell, Storages>::value...}};
}

template <class Cells, class Storages = AllStorages>
struct Table;
template <class... Cells, class Storages>
struct Table<CellList<Cells...>, Storages> {
  static constexpr CellKernels kernels[] = {cell_kernels<Cells>(Storages{})...};
};

}  // namespace fastrnn::FASTRNN_ISA
