// The table of one instruction set: every cell and storage type that it serves. Included last by
// each isa_*.cpp.
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
struct KernelsOf {
  using K = Shape<Cell, S>;
  static constexpr LayerKernels value = {K::lanes,
                                         Factor<typename K::E>::depth,
                                         K::rows,
                                         K::units,
                                         packed_size<Packing<Cell, S>>,
                                         scratch_of<Forward<Cell, S>>,
                                         scratch_of<Backward<Cell, S>>,
                                         pack<Packing<Cell, S>>,
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
