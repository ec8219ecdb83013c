#include "functions.h"

namespace fastrnn::cuda {

const LayerFunctions& functions_f64(int cell) { return functions<double>(AllCells{}, cell); }

}  // namespace fastrnn::cuda
