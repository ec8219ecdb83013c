// The kernels and their list: one translation unit for each cell and operand (*_*.cu).
#pragma once

#include "persistent.h"
#include "persistent/machine.cuh"

namespace fastrnn::persistent {

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_forward(const __grid_constant__ Forward<Storage<typename C::Operand>> p) {
#if defined(__CUDA_ARCH__)
  if constexpr (C::via != Via::cluster || __CUDA_ARCH__ >= 900) {
    extern __shared__ Words shared[];
    CudaMachine machine{reinterpret_cast<unsigned char*>(shared)};
    forward<C>(machine, p);
  }
#endif
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    persistent_backward(const __grid_constant__ Backward<Storage<typename C::Operand>> p) {
#if defined(__CUDA_ARCH__)
  if constexpr (C::via != Via::cluster || __CUDA_ARCH__ >= 900) {
    extern __shared__ Words shared[];
    CudaMachine machine{reinterpret_cast<unsigned char*>(shared)};
    backward<C>(machine, p);
  }
#endif
}

template <class C>
Kernel forward_entry() {
  return kernel_of<C>(Pass::forward, reinterpret_cast<const void*>(&persistent_forward<C>));
}

template <class C>
Kernel backward_entry() {
  return kernel_of<C>(Pass::backward, reinterpret_cast<const void*>(&persistent_backward<C>));
}

// A cell's kernels with one operand. The number of chunks is limited by the registers (product.h
// has the formula). A chunk has 32 values of K for a 16-bit operand and 16 for float32, so the same
// H needs twice as many chunks; therefore one block holds half the units in backward.
template <class Cell, class Operand>
struct Kernels;

template <class Cell, class Operand, Via via, int tiles, int registers, int shared, int batch>
using ForwardConfig = Config<Cell, Operand, via, Cell::gates, tiles, registers, shared, batch>;
template <class Cell, class Operand, Via via, int tiles, int registers, int shared, int batch>
using BackwardConfig = Config<Cell, Operand, via, 1, tiles, registers, shared, batch>;

// The three products of float32 need more temporary registers than one product: one chunk less.
template <class Operand>
inline constexpr int kLess = std::is_same_v<Operand, Float32> ? 1 : 0;

template <class Operand>
struct Kernels<Lstm, Operand> {
  template <Via via, int tiles, int registers, int shared, int batch>
  using F = ForwardConfig<Lstm, Operand, via, tiles, registers - kLess<Operand>,
                          shared + kLess<Operand>, batch>;
  template <Via via, int tiles, int registers, int shared, int batch>
  using B = BackwardConfig<Lstm, Operand, via, tiles, registers - 2 * kLess<Operand>,
                           shared + 2 * kLess<Operand>, batch>;

  static const Kernel* list(int* count) {
    static const Kernel all[] = {
        forward_entry<F<Via::block, 8, 4, 0, 1>>(),
        forward_entry<F<Via::cluster, 2, 4, 0, 1>>(),
        forward_entry<F<Via::ring, 1, 4 - kLess<Operand>, kLess<Operand>, 2>>(),
        forward_entry<F<Via::ring, 1, 4, 4, 1>>(),
        backward_entry<std::conditional_t<Operand::per_word == 2, B<Via::block, 8, 12, 4, 1>,
                                          B<Via::block, 4, 8, 0, 1>>>(),
        backward_entry<B<Via::cluster, 2, 12, 4, 1>>(),
        backward_entry<B<Via::ring, 1, 12, 4, 2>>(),
        backward_entry<B<Via::ring, 1, 12, 12, 1>>(),
    };
    *count = sizeof all / sizeof all[0];
    return all;
  }
};

template <class Operand>
struct Kernels<Gru, Operand> {
  template <Via via, int tiles, int registers, int shared, int batch>
  using F = ForwardConfig<Gru, Operand, via, tiles, registers - kLess<Operand>,
                          shared + kLess<Operand>, batch>;
  template <Via via, int tiles, int registers, int shared, int batch>
  using B = BackwardConfig<Gru, Operand, via, tiles, registers, shared, batch>;

  static const Kernel* list(int* count) {
    static const Kernel all[] = {
        forward_entry<F<Via::block, 8, 4, 0, 1>>(),
        forward_entry<F<Via::cluster, 2, 4, 0, 1>>(),
        forward_entry<F<Via::ring, 1, 4, 0, 2>>(),
        forward_entry<F<Via::ring, 1, 5, 4, 1>>(),
        backward_entry<std::conditional_t<Operand::per_word == 2, B<Via::block, 8, 10, 2, 1>,
                                          B<Via::block, 4, 6, 0, 1>>>(),
        backward_entry<B<Via::cluster, 2, 10, 2, 1>>(),
        backward_entry<B<Via::ring, 1, 10, 2, 2>>(),
        backward_entry<B<Via::ring, 1, 12, 15, 1>>(),
    };
    *count = sizeof all / sizeof all[0];
    return all;
  }
};

template <class Operand>
struct Kernels<Elman, Operand> {
  template <Via via, int tiles, int registers, int shared, int batch>
  using F = ForwardConfig<Elman, Operand, via, tiles, registers, shared, batch>;
  template <Via via, int tiles, int registers, int shared, int batch>
  using B = BackwardConfig<Elman, Operand, via, tiles, registers, shared, batch>;

  static const Kernel* list(int* count) {
    static const Kernel all[] = {
        forward_entry<F<Via::block, 8, 8, 0, 1>>(),  forward_entry<F<Via::cluster, 2, 8, 0, 1>>(),
        forward_entry<F<Via::ring, 1, 9, 0, 2>>(),   forward_entry<F<Via::ring, 1, 14, 3, 1>>(),
        backward_entry<B<Via::block, 8, 8, 0, 1>>(), backward_entry<B<Via::cluster, 2, 8, 0, 1>>(),
        backward_entry<B<Via::ring, 1, 9, 0, 2>>(),  backward_entry<B<Via::ring, 1, 13, 4, 1>>(),
    };
    *count = sizeof all / sizeof all[0];
    return all;
  }
};

}  // namespace fastrnn::persistent
