#define FASTRNN_ISA neon
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 32
#include "kernels.h"

namespace fastrnn {
const InstructionSet neon_set = neon::whole_set("neon", neon_programs);
}
