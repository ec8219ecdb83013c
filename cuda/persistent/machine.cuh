// The machine interface of the persistent kernels, on a GPU. cuda/persistent/tests/host_machine.h
// implements the same members on a CPU.
//
//   thread, block        the index of the thread in its block, of the block in the launch
//   shared               the block's shared memory
//   sync, converge       barriers of the block and of the warp
//   multiply             one product of the warp (words.h)
//   shuffle…             a value of another lane
//   load, store, fence   words of the ring: relaxed at device scope, and the fence of that scope
//   waiting              called whenever a word or a barrier has not arrived yet
//   barrier_…, send, cluster_sync   operations of a cluster (cluster.h); sm_90 and later
//   prefetch             prefetches an address into L2
//   opaque               returns its argument and hides its value from the compiler, so that values
//                        computed from it are recomputed at each step, not kept in registers
//
// If FASTRNN_WATCHDOG is defined, a wait with more iterations than any valid launch needs stops the
// kernel with an error, so that a missing word does not hang the device.
#pragma once

#include <cuda_runtime.h>

#include "persistent/cluster.h"

namespace fastrnn::persistent {

struct CudaMachine {
  unsigned char* memory;
#if defined(FASTRNN_WATCHDOG)
  unsigned turns = 0;
#endif

  __device__ __forceinline__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int block() const { return static_cast<int>(blockIdx.x); }
  __device__ __forceinline__ unsigned char* shared() const { return memory; }
  __device__ __forceinline__ void sync() { __syncthreads(); }
  __device__ __forceinline__ void converge() { __syncwarp(); }
  __device__ __forceinline__ float shuffle_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }
  __device__ __forceinline__ u32 shuffle(u32 x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
  }
  __device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
  }
  __device__ __forceinline__ void prefetch(const float* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(at)));
  }

  __device__ __forceinline__ void waiting() {
#if defined(FASTRNN_WATCHDOG)
    if (++turns == FASTRNN_WATCHDOG) __trap();
#endif
  }

  // ---- products -------------------------------------------------------------------------------

  __device__ __forceinline__ void multiply(BFloat16, float (&c)[4], const Words& a, u32 b0,
                                           u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
  }
  __device__ __forceinline__ void multiply(Float16, float (&c)[4], const Words& a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
  }
  __device__ __forceinline__ void multiply(Tf32, float (&c)[4], const Words& a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
  }
  __device__ __forceinline__ void multiply(Float32, float (&c)[4], const Words& a, u32 b0, u32 b1) {
    Words high, low;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 word = static_cast<u32>(opaque(static_cast<int>(a.v[i])));  // split at each step
      high.v[i] = Float32::high(word);
      low.v[i] = Float32::low(word, high.v[i]);
    }
    const u32 high0 = Float32::high(b0), high1 = Float32::high(b1);
    multiply(Tf32{}, c, low, high0, high1);
    multiply(Tf32{}, c, high, Float32::low(b0, high0), Float32::low(b1, high1));
    multiply(Tf32{}, c, high, high0, high1);
  }

  // ---- the ring -------------------------------------------------------------------------------

  __device__ __forceinline__ Words load(const u32* at) {
    Words w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
                 : "l"(__cvta_generic_to_global(at))
                 : "memory");
    return w;
  }
  __device__ __forceinline__ void store(u32* at, u32 word) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(at)),
                 "r"(word)
                 : "memory");
  }
  __device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

  // ---- the cluster ----------------------------------------------------------------------------

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  static __device__ __forceinline__ u32 address(const void* at) {
    return static_cast<u32>(__cvta_generic_to_shared(at));
  }
  static __device__ __forceinline__ u32 address_of(int block, const void* at) {
    u32 there;
    // Volatile, so that the compiler does not map the address of a missing block before the branch
    // that excludes it.
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(there)
                 : "r"(address(at)), "r"(block));
    return there;
  }
  __device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n\t"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
  }
  __device__ __forceinline__ void barrier_init(Barrier* barrier) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
        "fence.mbarrier_init.release.cluster;" ::"r"(address(barrier))
        : "memory");
  }
  __device__ __forceinline__ void barrier_expect(Barrier* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
    for (;;) {
      u32 done;
      asm volatile(
          "{\n\t"
          ".reg .pred complete;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, complete;\n\t"
          "}"
          : "=r"(done)
          : "r"(address(barrier)), "r"(parity)
          : "memory");
      if (done) break;
      waiting();
    }
    converge();
  }
  __device__ __forceinline__ void send(int block, u32* to, const Words& words, Barrier* barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, "
        "[%5];" ::"r"(address_of(block, to)),
        "r"(words.v[0]), "r"(words.v[1]), "r"(words.v[2]), "r"(words.v[3]),
        "r"(address_of(block, barrier))
        : "memory");
  }
#endif
};

}  // namespace fastrnn::persistent
