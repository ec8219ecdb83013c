// AVX-512 with products of bfloat16 pairs: bfloat16 alone, the rest is AVX-512's.
#define FASTRNN_ISA avx512bf16
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx512bf16_set = {
    "avx512bf16",
    avx512bf16::Table<AllCells, avx512bf16::StorageList<void, void, Bf16, void>>::kernels,
    avx512bf16::roof_loops, nullptr, &avx512vnni_set};
}
