#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "layer.h"
#include "program_walk.h"

namespace fastrnn {
const ProgramKernels avx512_programs = avx512::program_kernels;
}
