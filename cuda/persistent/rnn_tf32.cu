// The persistent kernels of one cell and operand.
#include "persistent/kernels.cuh"

namespace fastrnn::persistent {

const Kernel* rnn_tf32_kernels(int* count) { return Kernels<Elman, Tf32>::list(count); }

}  // namespace fastrnn::persistent
