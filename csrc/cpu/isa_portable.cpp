#define FASTRNN_ISA portable
#define FASTRNN_VECTOR_BYTES 16
#define FASTRNN_REGISTERS 16
#include "int8.h"
#include "kernels.h"

namespace fastrnn {
const InstructionSet portable_set = {"portable",
                                     portable::Table<AllCells>::kernels,
                                     portable::roof_loops,
                                     portable::Int8Table<AllCells>::kernels,
                                     nullptr,
                                     &portable_programs};
}
