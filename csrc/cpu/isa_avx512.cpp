#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "int8.h"
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx512_set = {"avx512",
                                   avx512::Table<AllCells>::kernels,
                                   avx512::roof_loops,
                                   avx512::Int8Table<AllCells>::kernels,
                                   nullptr,
                                   &avx512_programs};
}
