// The cells of the engine. A new cell is a header in this folder and a place in this list.
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

#if defined(FASTRNN_EXTRA_CELL)  // one more cell from outside the tree, which tests/ uses
#include FASTRNN_EXTRA_CELL
#endif

namespace fastrnn {

template <class... Cells>
struct CellList {
  static constexpr int size = sizeof...(Cells);
};

#if defined(FASTRNN_EXTRA_CELL)
using AllCells = CellList<Elman, Lstm, Gru, GruResetBefore, ExtraCell>;
#else
using AllCells = CellList<Elman, Lstm, Gru, GruResetBefore>;
#endif

}  // namespace fastrnn
