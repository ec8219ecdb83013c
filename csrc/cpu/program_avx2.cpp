#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#include "layer.h"
#include "program_walk.h"

namespace fastrnn {
const ProgramKernels avx2_programs = avx2::program_kernels;
}
