#define FASTRNN_ISA avx512
#define FASTRNN_VECTOR_BYTES 64
#define FASTRNN_REGISTERS 32
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx512_set = avx512::whole_set("avx512", avx512_programs);
}
