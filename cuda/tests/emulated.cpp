// One unit of cuda/ compiled for the CPU: FASTRNN_UNIT names it.
#include "emulator.h"

#include FASTRNN_UNIT
