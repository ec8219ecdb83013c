#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#include "int8.h"
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx2_set = {"avx2",           avx2::Table<AllCells>::kernels,
                                 avx2::roof_loops, avx2::Int8Table<AllCells>::kernels,
                                 nullptr,          &avx2_programs};
}
