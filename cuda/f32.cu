#include "functions.h"

namespace fastrnn::cuda {

const LayerFunctions& functions_f32(int cell) { return functions<float>(AllCells{}, cell); }

}  // namespace fastrnn::cuda
