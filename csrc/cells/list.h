// The cells of the engine. A new cell is a header in this folder and a place in this list.
// `carries`: a part of h passes the cell without a product (a GRU's z·h), so backward reads h and
// carries a part of dh past the product too.
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

#if defined(FASTRNN_EXTRA_CELL)  // a header from outside the tree that defines ExtraCell
#include FASTRNN_EXTRA_CELL
#endif

namespace fastrnn {

template <class... Cells>
struct CellList {};

#if defined(FASTRNN_EXTRA_CELL)  // an engine of that cell alone
using AllCells = CellList<ExtraCell>;
#else
using AllCells = CellList<Elman, Lstm, Gru, GruResetBefore>;
#endif

}  // namespace fastrnn
