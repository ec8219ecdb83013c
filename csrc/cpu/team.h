// How many threads work on a layer, how they divide it, and the parallel region that runs them.
#pragma once

#include "stack.h"

namespace fastrnn {

// Estimated nanoseconds of one direction of a layer, whose rows are divided among `rows` threads
// and whose hidden units among `columns`.
double layer_time(const Stack& s, int rows, int columns);

// The fastest plan by that estimate. Where the cores are oversubscribed, hidden units are not split
// across threads, which would wait for each other at every step.
Plan make_plan(const Stack& s, bool oversubscribed);

// Runs a kernel of a layer with the layer's team.
void run_layer(const Layer& layer, void (*run)(const Layer&, int thread, int threads));

}  // namespace fastrnn
