// Ensembles: problems of equal options, sizes and threads, run by one call (Backend in
// ../backend.h).
#pragma once

#include "../backend.h"

namespace fastrnn {

std::size_t ensemble_workspace_size(const Problem* problems, std::int64_t count, Pass pass);
void run_ensemble(const Problem* problems, std::int64_t count, Pass pass);

}  // namespace fastrnn
