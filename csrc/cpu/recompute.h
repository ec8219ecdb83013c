// Backward with Options::recompute.
#pragma once

#include "workspace.h"

namespace fastrnn {

// Runs a layer backward in parts of its steps, one direction after the other. Parts run from the
// last in the direction's order to the first: forward again over the part, for its saved values,
// then backward over it. Every value has the bits of a pass over all steps at once.
void run_in_parts(const Stack& s, const Workspace& w, const Layer& layer);

}  // namespace fastrnn
