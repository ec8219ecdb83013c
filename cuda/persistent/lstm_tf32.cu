// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* lstm_tf32_kernels(int* count) { return Kernels<Lstm, Tf32>::list(count); }

}  // namespace fastrnn::persistent
