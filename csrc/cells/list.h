// The fused cells, torch.nn's own; every other cell is a program (program.h).
// `carries`: part of h bypasses the product (a GRU's z·h), so backward reads h, and part of dh
// bypasses the product too.
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

namespace fastrnn {

template <class... Cells>
struct CellList {};

using AllCells = CellList<Elman, Lstm, Gru, GruResetBefore>;

}  // namespace fastrnn
