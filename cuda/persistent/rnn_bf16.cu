// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* rnn_bf16_kernels(int* count) { return Kernels<Elman, BFloat16>::list(count); }

}  // namespace fastrnn::persistent
