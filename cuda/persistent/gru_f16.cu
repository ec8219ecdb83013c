// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* gru_f16_kernels(int* count) { return Kernels<Gru, Float16>::list(count); }

}  // namespace fastrnn::persistent
