// The instruction sets of the CPU engine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../problem.h"

namespace fastrnn {

// The set in use: the widest that this CPU runs, or what FASTRNN_ISA asks for.
// Throws std::invalid_argument where FASTRNN_ISA names a set that is unknown or cannot run here.
const char* cpu_isa();

// The set whose int8 kernels are in use, and whose order packed int8 weights have: that set, or the
// one that it extends.
const char* cpu_int8_isa();

// Every set that was built and that this CPU runs, widest first.
std::vector<std::string> cpu_isas();

// The limits of this machine with the set in use, all threads together (roof.h): each runs its loop
// for `seconds`, after a fifth of that untimed. On one thread where run_threads() (threads.h)
// cannot start `threads`.

// GFLOP/s of multiply-adds on registers, f32 or f64.
double fma_peak(DType dtype, int threads, double seconds);

// GB/s of each thread reading an array of its own of `bytes`, again and again.
// Throws std::bad_alloc where there is no memory for the arrays.
double read_bandwidth(std::int64_t bytes, int threads, double seconds);

// Nanoseconds of a forward pass with p.threads threads, by the estimate that sizes its teams
// (team.h). Reads options, dtype and sizes alone.
double estimated_time(const Problem& p);

}  // namespace fastrnn
