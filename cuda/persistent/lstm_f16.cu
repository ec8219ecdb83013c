// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* lstm_f16_kernels(int* count) { return Kernels<Lstm, Float16>::list(count); }

}  // namespace fastrnn::persistent
