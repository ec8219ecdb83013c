// One translation unit of cuda/ compiled for the CPU; FASTRNN_UNIT is its name.
#include "emulator.h"

#include FASTRNN_UNIT
