// AVX-512 with products of int8 quadruples: int8 alone, the rest is AVX-512's.
#define FASTRNN_ISA avx512vnni
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx512vnni_set = {"avx512vnni", nullptr, avx512vnni::roof_loops,
                                       avx512vnni::Int8Table<AllCells>::kernels, &avx512_set};
}
