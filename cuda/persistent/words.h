// Numbers in the persistent kernels: 32-bit words, the operands of the tensor cores' products, and
// which lane holds which element of a product. Everything here also runs on the host, where
// cuda/persistent/tests/ tests it.
//
// Word        two neighbouring bfloat16 or float16 values (the first in the lower half), or one
//             float. A row of K values is K / per_word words.
// Product     mma.sync of 16 × 8 × (8 words): m16n8k16 for the 16-bit types, m16n8k8 for TF32. In
//             words both have the same shape; with g = lane / 4 and t = lane % 4
//               A (weights)  a0 (row g, word t)  a1 (g + 8, t)  a2 (g, t + 4)  a3 (g + 8, t + 4)
//               B (state)    b0 (word t, column g)  b1 (word t + 4, column g)
//               C (sums)     c0 (row g, column 2t)  c1 (g, 2t + 1)  c2 (g + 8, 2t)  c3 (g+8, 2t+1)
// Chunk       16 words of K, two products. The order of K is free as long as A and B agree, so word
//             t of the instruction in product q is word 4t + 2q of the chunk, and word t + 4 is
//             word 4t + 2q + 1. A lane then holds words 4t … 4t + 3: one 16-byte access, directly
//             from memory into the product.
// Rows of A   a warp computes `M` tiles of 16 rows, each one gate of the same 16 hidden units. Row
//             g is unit 2g and row g + 8 is unit 2g + 1, so a lane's sums belong to neighbouring
//             units, which share a word.
// Columns     rows of the batch, 8 per tile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"
#include "problem.h"
#include "value.h"

#if defined(__CUDACC__)
#define FASTRNN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTRNN_ON_MACHINE __device__ __forceinline__
#else
#define FASTRNN_HOST_DEVICE inline
#define FASTRNN_ON_MACHINE inline
#endif

namespace fastrnn::persistent {

using u32 = std::uint32_t;

inline constexpr int kLanes = 32, kWarps = 8, kThreads = kWarps * kLanes;
inline constexpr int kUnits = 16;      // hidden units per warp: rows of a tile of A
inline constexpr int kRows = 8;        // rows of the batch in a tile: columns of B
inline constexpr int kChunk = 16;      // words of K in a chunk
inline constexpr int kFragment = 128;  // sums of a tile: 16 units × 8 rows

struct alignas(16) Words {
  u32 v[4];
};
struct alignas(16) Sums {
  float v[4];
};

FASTRNN_HOST_DEVICE u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTRNN_HOST_DEVICE float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// ---- operands ---------------------------------------------------------------------------------
// An operand defines how a value is stored in the caller's arrays, how it is rounded into a word,
// and how many values of K a word holds.

struct BFloat16 {
  using Storage = std::uint16_t;
  static constexpr int per_word = 2;
  static FASTRNN_HOST_DEVICE float load(Storage s) { return float_of(static_cast<u32>(s) << 16); }
  static FASTRNN_HOST_DEVICE Storage store(float x) {
#if defined(__CUDA_ARCH__)
    Storage s;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(s) : "f"(x));
    return s;
#else
    const u32 bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return static_cast<Storage>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
  }
};

struct Float16 {
  using Storage = std::uint16_t;
  static constexpr int per_word = 2;
  static FASTRNN_HOST_DEVICE float load(Storage s) {
#if defined(__CUDA_ARCH__)
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(s));
    return x;
#else
    const u32 sign = (s & 0x8000u) << 16, magnitude = s & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    const float scaled = float_of(magnitude << 13) * 0x1p112f;  // exact, subnormals too
    return float_of(sign | bits_of(scaled));
#endif
  }
  static FASTRNN_HOST_DEVICE Storage store(float x) {
#if defined(__CUDA_ARCH__)
    Storage s;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(s) : "f"(x));
    return s;
#else
    const u32 sign = (bits_of(x) >> 16) & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fffu;
    if (magnitude >= 0x477ff000u) return static_cast<Storage>(sign | 0x7c00u);
    if (magnitude < 0x38800000u) {  // subnormal: the adder rounds at the last place of 0.5
      const u32 rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
      return static_cast<Storage>(sign | rounded);
    }
    const u32 rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<Storage>(sign | (rounded >> 13));
#endif
  }
};

// float32 rounded to TF32 (8 bits of exponent, 10 of mantissa) before it is multiplied.
struct Tf32 {
  using Storage = float;
  static constexpr int per_word = 1;
  static FASTRNN_HOST_DEVICE float load(Storage s) { return s; }
  static FASTRNN_HOST_DEVICE Storage store(float x) { return x; }
  static FASTRNN_HOST_DEVICE u32 word(float x) {
    const bool finite = (bits_of(x) & 0x7f800000u) != 0x7f800000u;
    return finite ? (bits_of(x) + 0x1000u) & 0xffffe000u : bits_of(x);
  }
};

// float32 as the sum of two TF32 values: three products (the fourth is below the rounding of the
// sum), with an error of about 2^-22 of each product. The product splits the values.
struct Float32 {
  using Storage = float;
  static constexpr int per_word = 1;
  static FASTRNN_HOST_DEVICE float load(Storage s) { return s; }
  static FASTRNN_HOST_DEVICE Storage store(float x) { return x; }
  static FASTRNN_HOST_DEVICE u32 word(float x) { return bits_of(x); }
  static FASTRNN_HOST_DEVICE u32 high(u32 w) { return (w + 0x1000u) & 0xffffe000u; }
  // What `high` leaves; nothing of an infinity or NaN.
  static FASTRNN_HOST_DEVICE u32 low(u32 w, u32 high) {
    return (high & 0x7f800000u) == 0x7f800000u ? 0u : bits_of(float_of(w) - float_of(high));
  }
};

template <class Operand>
using Storage = typename Operand::Storage;

// The value rounded to storage, which a step passes to the next.
template <class Operand>
FASTRNN_HOST_DEVICE float rounded(float x) {
  return Operand::load(Operand::store(x));
}

// A word of two neighbours, or only of `first` if a word holds one value.
template <class Operand>
FASTRNN_HOST_DEVICE u32 word_of(float first, float second) {
  if constexpr (Operand::per_word == 2)
    return static_cast<u32>(Operand::store(first)) | static_cast<u32>(Operand::store(second)) << 16;
  else
    return Operand::word(first);
}

// ---- the lanes' elements ----------------------------------------------------------------------

FASTRNN_HOST_DEVICE int group_of(int lane) { return lane >> 2; }  // g
FASTRNN_HOST_DEVICE int member_of(int lane) { return lane & 3; }  // t

// A fragment's sums stand in shared memory as one Sums per lane, (c0, c2, c1, c3): unit 2g and 2g +
// 1 of row 2t, then of row 2t + 1. The place of lane (g, t) is such that writing (8 lanes at a
// time) and reading 16 units of two rows (32 words at a time) both touch each bank once.
FASTRNN_HOST_DEVICE int place_of_lane(int lane) {
  const int g = group_of(lane), t = member_of(lane);
  return 8 * t + (g ^ (2 * t));
}

// Element `at` (0 … 127) of a fragment that stands so.
FASTRNN_HOST_DEVICE int row_at(int at) { return 2 * (at >> 5) + ((at >> 1) & 1); }
FASTRNN_HOST_DEVICE int unit_at(int at) {
  const int g = ((at & 31) >> 2) ^ (2 * (at >> 5));
  return 2 * g + (at & 1);
}

// The sums of a lane in that order.
FASTRNN_HOST_DEVICE Sums in_order(const float (&c)[4]) { return {{c[0], c[2], c[1], c[3]}}; }

// What lane (g, t) holds of that order at j: unit and row within the tile.
FASTRNN_HOST_DEVICE int unit_of_sum(int lane, int j) { return 2 * group_of(lane) + (j & 1); }
FASTRNN_HOST_DEVICE int row_of_sum(int lane, int j) { return 2 * member_of(lane) + (j >> 1); }

using Value = cuda::Value<float>;

}  // namespace fastrnn::persistent
