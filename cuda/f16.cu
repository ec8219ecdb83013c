#include "functions.h"

namespace fastrnn::cuda {

const LayerFunctions& functions_f16(int cell) { return functions<F16>(AllCells{}, cell); }

}  // namespace fastrnn::cuda
