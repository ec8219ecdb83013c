// AVX2 with products of int8 quadruples: int8 alone, the rest is AVX2's.
#define FASTRNN_ISA avxvnni
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#include "kernels.h"

namespace fastrnn {
const InstructionSet avxvnni_set = {"avxvnni", nullptr, avxvnni::roof_loops,
                                    avxvnni::Int8Table<AllCells>::kernels, &avx2_set};
}
