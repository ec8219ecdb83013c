#define FASTRNN_ISA neon
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 32
#include "layer.h"
#include "program_walk.h"

namespace fastrnn {
const ProgramKernels neon_programs = neon::program_kernels;
}
