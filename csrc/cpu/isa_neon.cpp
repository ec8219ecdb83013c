#define FASTRNN_ISA neon
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 32
#include "int8.h"
#include "kernels.h"

namespace fastrnn {
const InstructionSet neon_set = {"neon",           neon::Table<AllCells>::kernels,
                                 neon::roof_loops, neon::Int8Table<AllCells>::kernels,
                                 nullptr,          &neon_programs};
}
