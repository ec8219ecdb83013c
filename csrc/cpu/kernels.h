// The kernels of one instruction set: a table of every cell and storage type. Included last by each
// isa_*.cpp.
#pragma once

#include "../cells/list.h"
#include "backward.h"
#include "forward.h"
#include "int8.h"
#include "roof.h"

namespace fastrnn::FASTRNN_ISA {

template <class Cell, class S>
struct KernelsOf {
  using K = Tiling<Cell, S>;
  static constexpr LayerKernels value = {K::lanes,
                                         Factor<typename K::E>::depth,
                                         K::rows,
                                         K::units,
                                         bytes_of<ForwardWeights<Cell, S>>,
                                         bytes_of<Forward<Cell, S>>,
                                         bytes_of<Backward<Cell, S>>,
                                         pack_weights<ForwardWeights<Cell, S>>,
                                         run_pass<Forward<Cell, S>>,
                                         run_pass<Backward<Cell, S>>,
                                         nullptr};
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

// ---- int8 ---------------------------------------------------------------------------------------

template <class Cell>
void unpack_weights(const Layer& layer, int thread, int threads) {
  Int8Weights<Cell>(layer, layer.packed).unpack(thread, threads);
}

template <class Cells = AllCells>
struct Int8Table;
template <class... Cells>
struct Int8Table<CellList<Cells...>> {
  static constexpr LayerKernels kernels[] = {
      {Vec<float>::lanes, Dot::depth, Tiling<Cells, float>::rows, Tiling<Cells, float>::units,
       bytes_of<Int8Weights<Cells>>, bytes_of<Forward<Cells, float, Int8Weights<Cells>>>, nullptr,
       pack_weights<Int8Weights<Cells>>, run_pass<Forward<Cells, float, Int8Weights<Cells>>>,
       nullptr, unpack_weights<Cells>}...};
};

// ---- sets ---------------------------------------------------------------------------------------

// A set with kernels of its own for everything.
template <class Cells = AllCells>
constexpr InstructionSet whole_set(const char* name, const ProgramKernels& programs) {
  return {name, Table<Cells>::kernels, roof_loops, Int8Table<Cells>::kernels, nullptr, &programs};
}

}  // namespace fastrnn::FASTRNN_ISA
