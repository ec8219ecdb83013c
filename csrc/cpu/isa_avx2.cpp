#define FASTRNN_ISA avx2
#define FASTRNN_VECTOR_BYTES 32
#define FASTRNN_REGISTERS 16
#include "kernels.h"

namespace fastrnn {
const InstructionSet avx2_set = avx2::whole_set("avx2", avx2_programs);
}
