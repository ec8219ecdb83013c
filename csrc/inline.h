// How a function is compiled that every device uses. Always inlined: the kernels of an instruction
// set, or of a GPU, never end up with another's copy. And how a loop over registers is.
#pragma once

#if defined(__CUDACC__)
#define FASTRNN_CELL __host__ __device__ __forceinline__
#define FASTRNN_UNROLL _Pragma("unroll")
#else
#define FASTRNN_CELL inline __attribute__((always_inline))
#define FASTRNN_UNROLL _Pragma("GCC unroll 32")
#endif
