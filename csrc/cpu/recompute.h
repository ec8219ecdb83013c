// Backward with Options::recompute.
#pragma once

#include "workspace.h"

namespace fastrnn {

// Runs a layer backward in parts of its steps, one direction after the other. Parts run from the
// last of the walk to the first: forward once more over the part, for its saved values, then
// backward over it. Every value is bit for bit the one of a pass over all steps at once.
void run_in_parts(const Stack& s, const Workspace& w, const Layer& layer);

}  // namespace fastrnn
