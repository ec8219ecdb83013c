#include "functions.h"

namespace fastrnn::cuda {

const LayerFunctions& functions_bf16(int cell) { return functions<Bf16>(AllCells{}, cell); }

}  // namespace fastrnn::cuda
