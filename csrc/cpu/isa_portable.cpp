#define FASTRNN_ISA portable
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#include "kernels.h"

namespace fastrnn {
const InstructionSet portable_set = portable::whole_set("portable", portable_programs);
}
