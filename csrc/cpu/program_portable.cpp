#define FASTRNN_ISA portable
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#include "layer.h"
#include "program_walk.h"

namespace fastrnn {
const ProgramKernels portable_programs = portable::program_kernels;
}
