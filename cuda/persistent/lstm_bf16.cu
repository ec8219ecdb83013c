// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* lstm_bf16_kernels(int* count) { return Kernels<Lstm, BFloat16>::list(count); }

}  // namespace fastrnn::persistent
