// How functions that every device uses are compiled: always inlined, so that no instruction set and
// no GPU uses code that was compiled for another. And how loops over registers are unrolled.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_CELL __host__ __device__ __forceinline__
#define FASTRNN_UNROLL _Pragma("unroll")
#else
#define FASTRNN_CELL inline __attribute__((always_inline))
#define FASTRNN_UNROLL _Pragma("GCC unroll 32")
#endif
