// The instruction sets of the CPU engine.
#pragma once

#include <string>
#include <vector>

namespace fastrnn {

// The set in use: the widest that this CPU runs, or what FASTRNN_ISA asks for.
// Throws std::invalid_argument where FASTRNN_ISA names a set that is unknown or cannot run here.
const char* cpu_isa();

// Every set that was built and that this CPU runs, widest first.
std::vector<std::string> cpu_isas();

}  // namespace fastrnn
