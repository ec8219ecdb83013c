// The weights of a layer as int8, and products by them: what forward.h takes in place of
// ForwardWeights.
//
// Weights       each row w of a matrix by itself, quantised before they are packed (quantize.h):
//               scale s_w = max|w| / 127, q_w = round(w / s_w).
// Operands      at each step each row x of the input, of h and of what a second product reads:
//               s_x = max|x| / 127, q_x = round(x / s_x), to nearest, ties to even, within ±127. A
//               row whose largest value is below 1e-30 counts as zeros.
// Sums          Σ q_x·q_w in 32 bits, exact, so the same on every instruction set and in any order,
//               up to 2^17 products.
// Maths         a = b + s_x·s_w·Σ q_x·q_w + s_h·s_v·Σ q_h·q_v in float, then the cell of
//               csrc/cells/ in float. h and c stay float: only the products are rounded.
// NaN           a row of operands or of weights that holds NaN or an infinity gives NaN.
//
// With VNNI a lane adds four products of an unsigned operand, q_x + 128, by a signed weight; sums
// start from −128·Σ q_w, which cancels the offset. Elsewhere a lane adds two products of 16 bits.
//
// Layouts       weights [block of units][k / depth][tile][gate][lane][depth], as pack.h has it;
//               scales, starts, biases [block][tile][gate][lane]
//               operands [row][K up to a whole vector], each thread's own
// Threads       each quantises the rows that it multiplies. Threads that share rows each do so.
// Cost          per step and row G·H·(I + O) products, a byte each from the cache for each block of
//               rows.
#pragma once

#include "../quantize.h"
#include "tiling.h"

namespace fastrnn::FASTRNN_ISA {

// ---- integer products ---------------------------------------------------------------------------

using Ints = Vec<float>::Bits;  // 32 bits a lane

FASTRNN_INLINE Ints load_ints(const std::int32_t* p) {
  typedef std::int32_t Unaligned
      __attribute__((vector_size(FASTRNN_VECTOR_BYTES), aligned(4), may_alias));
  return *reinterpret_cast<const Unaligned*>(p);
}

// Dot adds, in every lane, `depth` products of operands, broadcast, and of each output's weights.
// Operands are stored as q + offset.
#if defined(__AVX512VNNI__) && FASTRNN_VECTOR_BYTES == 64
struct Dot {
  static constexpr int depth = 4, offset = 128;
  using Operand = std::uint8_t;
  using Weights = Ints;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    return (Ints)_mm512_loadu_si512(p);
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
  }
};
#elif defined(__AVXVNNI__) && FASTRNN_VECTOR_BYTES == 32
struct Dot {
  static constexpr int depth = 4, offset = 128;
  using Operand = std::uint8_t;
  using Weights = Ints;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    return (Ints)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)w);
  }
};
#else
struct Dot {
  static constexpr int depth = 2, offset = 0;
  using Operand = std::int16_t;
#if defined(__AVX512BW__) && FASTRNN_VECTOR_BYTES == 64
  using Weights = __m512i;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return sum + (Ints)_mm512_madd_epi16((__m512i)x, w);
  }
#elif defined(__AVX2__) && FASTRNN_VECTOR_BYTES == 32
  using Weights = __m256i;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return sum + (Ints)_mm256_madd_epi16((__m256i)x, w);
  }
#elif defined(__SSE2__)
  using Weights = __m128i;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return sum + (Ints)_mm_madd_epi16((__m128i)x, w);
  }
#elif defined(__aarch64__)
  using Weights = int16x8_t;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) { return vmovl_s8(vld1_s8(p)); }
  // Products within ±127² have room in 16 bits.
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return (Ints)vpadalq_s16((int32x4_t)sum, vmulq_s16((int16x8_t)x, w));
  }
#else  // pairs as the halves of a lane, on a little-endian machine
  typedef std::int16_t Pairs __attribute__((vector_size(FASTRNN_VECTOR_BYTES / 2)));
  using Weights = Ints;
  static FASTRNN_INLINE Weights weights(const std::int8_t* p) {
    Pairs pairs;
    __builtin_memcpy(&pairs, p, sizeof(pairs));
    return __builtin_convertvector(pairs, Ints);
  }
  static FASTRNN_INLINE Ints multiply_add(Ints x, Weights w, Ints sum) {
    return sum + ((x << 16) >> 16) * ((w << 24) >> 24) + (x >> 16) * (w >> 8);
  }
#endif
};
#endif

static_assert(Dot::depth * sizeof(Dot::Operand) == 4, "operands of a step fill a lane");

// Operands of `K` values take this many places in memory: whole vectors of 32-bit lanes.
FASTRNN_INLINE Index int8_row(Index K) {
  return ceil_div(K, Vec<float>::lanes) * Vec<float>::lanes;
}

// A row as operands, up to int8_row(K); returns its scale.
inline float quantise_row(Dot::Operand* to, const float* x, Index K) {
  using V = Vec<float>;
  typedef Dot::Operand Narrow __attribute__((vector_size(V::lanes * sizeof(Dot::Operand))));
  const Ints sign = sign_bit<float>();
  Ints most{};  // as bits, which for numbers of one sign are in the order of their values
  for (Index k = 0; k < K; k += V::lanes) {
    const Ints bits = (Ints)load_units<float>(x + k, K - k).v & ~sign;
    most = bits > most ? bits : most;
  }
  std::int32_t largest = 0;
  for (int lane = 0; lane < V::lanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  const Int8Scale s = int8_scale(as_float(static_cast<std::uint32_t>(largest)));
  const Ints base = (Ints)V(kRounder).v - Dot::offset;
  for (Index k = 0; k < K; k += V::lanes) {
    const V value = load_units<float>(x + k, K - k) * V(s.inverse) + V(kRounder);
    Ints q = (Ints)value.v - base;
    if (s.inverse == 0) q = Ints{} + Dot::offset;
    const Narrow narrow = __builtin_convertvector(q, Narrow);
    __builtin_memcpy(to + k, &narrow, sizeof(narrow));
  }
  return s.scale;
}

// ---- packed weights -----------------------------------------------------------------------------

// One matrix: blocks of `vectors` vectors of outputs over K.
struct Int8Matrix {
  std::int8_t* weights = nullptr;
  float* scale = nullptr;
  std::int32_t* start = nullptr;  // of each sum; null where the operands have no offset
  Index K = 0, steps = 0, vectors = 0;

  FASTRNN_INLINE void lay_out(Arena& arena, Index blocks, Index k, Index vectors_per_block) {
    constexpr Index lanes = Vec<float>::lanes;
    K = k;
    steps = ceil_div(k, Dot::depth);
    vectors = vectors_per_block;
    weights = arena.take<std::int8_t>(blocks * steps * vectors * lanes * Dot::depth);
    scale = arena.take<float>(blocks * vectors * lanes);
    if (Dot::offset != 0) start = arena.take<std::int32_t>(blocks * vectors * lanes);
  }
  FASTRNN_INLINE Index block_size() const {
    return steps * vectors * Vec<float>::lanes * Dot::depth;
  }
};

// Packs output `lane` of a block: row `row` of W; negative: none.
inline void pack_output(const Int8Matrix& m, Index b, Index lane, const Weight& w, Index row) {
  const Index outputs = m.vectors * Vec<float>::lanes;
  std::int8_t* to = m.weights + b * m.block_size() + lane * Dot::depth;
  const std::int8_t* from = static_cast<const std::int8_t*>(w.data) + (row < 0 ? 0 : row * w.row);
  std::int32_t sum = 0;
  for (Index k = 0; k < m.steps * Dot::depth; ++k) {
    const std::int8_t q = row >= 0 && k < m.K ? from[k * w.unit] : std::int8_t{0};
    sum += q;
    to[k / Dot::depth * outputs * Dot::depth + k % Dot::depth] = q;
  }
  m.scale[b * outputs + lane] = row < 0 ? 0 : w.scale[row];
  if (m.start) m.start[b * outputs + lane] = -Dot::offset * sum;
}

// The inverse.
inline void unpack_output(const Int8Matrix& m, Index b, Index lane, const Weight& w, Index row) {
  if (row < 0) return;
  const Index outputs = m.vectors * Vec<float>::lanes;
  const std::int8_t* from = m.weights + b * m.block_size() + lane * Dot::depth;
  std::int8_t* to = static_cast<std::int8_t*>(w.data) + row * w.row;
  for (Index k = 0; k < m.K; ++k)
    to[k * w.unit] = from[k / Dot::depth * outputs * Dot::depth + k % Dot::depth];
  w.scale[row] = m.scale[b * outputs + lane];
}

// Packs or unpacks one block of gates first … first + gates − 1 of W [.., K], as pack_gates()
// does: `units` rows to a gate.
template <class Change>
void change_block(const Int8Matrix& m, Index b, const Weight& w, Index units, Index first,
                  Index gates, Change change) {
  constexpr Index lanes = Vec<float>::lanes;
  const Index tiles = m.vectors / gates;
  for (Index v = 0; v < m.vectors; ++v)
    for (Index lane = 0; lane < lanes; ++lane) {
      const Index unit = (b * tiles + v / gates) * lanes + lane;
      const Index row = unit < units ? (first + v % gates) * units + unit : -1;
      change(m, b, v * lanes + lane, w, row);
    }
}

// Rows as operands, with their scales, in memory of the thread's own.
struct QuantisedRows {
  Dot::Operand* data = nullptr;
  float* scale = nullptr;
  Index stride = 0;

  QuantisedRows() = default;
  FASTRNN_INLINE QuantisedRows(Arena& arena, Index count, Index K)
      : data(arena.take<Dot::Operand>(count * int8_row(K))),
        scale(arena.take<float>(count)),
        stride(int8_row(K)) {}
  FASTRNN_INLINE void take(const float* const* from, Index count, Index K) {
    for (Index j = 0; j < count; ++j) scale[j] = quantise_row(data + j * stride, from[j], K);
  }
};

struct Int8Block {
  const Int8Matrix& matrix;
  Index b;
};

// Like ForwardWeights; always packed (Layer::packed).
template <class Cell>
class Int8Weights : Tiling<Cell, float> {
  using K = Tiling<Cell, float>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::units, K::first, K::wide;

 public:
  using E = float;
  using FirstRows = QuantisedRows;
  using SecondRows = QuantisedRows;

  Int8Weights(const Layer& layer, void* base)
      : layer_(layer),
        blocks_(ceil_div(layer.H, units)),
        out_blocks_(layer.P ? ceil_div(layer.O, wide * lanes) : 0) {
    Arena arena(base);
    for (Index d = 0; d < layer.directions; ++d) {
      Group& g = group_[d];
      g.ih.lay_out(arena, blocks_, layer.I, vectors);
      g.hh.lay_out(arena, blocks_, layer.O, first * tiles);
      if (layer.P)
        g.hr.lay_out(arena, out_blocks_, layer.H, wide);
      else if (K::two_products)
        g.hn.lay_out(arena, blocks_, layer.H, (gates - first) * tiles);
      for (float** bias : {&g.bias_x, &g.bias_h, &g.bias_ih})
        *bias = arena.take<float>(blocks_ * vectors * lanes);
    }
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  Int8Block weight_ih(Index d, Index b) const { return {group_[d].ih, b}; }
  Int8Block weight_hh(Index d, Index b) const { return {group_[d].hh, b}; }
  Int8Block weight_hn(Index d, Index b) const { return {group_[d].hn, b}; }
  Int8Block weight_hr(Index d, Index b) const { return {group_[d].hr, b}; }
  const float* bias_x(Index d, Index b) const { return group_[d].bias_x + b * vectors * lanes; }
  const float* bias_h(Index d, Index b) const { return group_[d].bias_h + b * vectors * lanes; }

  void pack(int thread, int threads) const {
    change(thread, threads, pack_output);
    const Range blocks = split(blocks_, thread, threads);
    each_bias(blocks, [&](const Group& g, const Parameters& p, Index gate, Index at, Index i) {
      const float input = bias(p.bias_ih, i), hidden = bias(p.bias_hh, i);
      g.bias_x[at] = Cell::separate[gate] ? input : input + hidden;
      g.bias_h[at] = hidden;
      g.bias_ih[at] = input;
    });
  }

  // Writes what pack() read to the arrays of `parameters`; no biases where these are null.
  void unpack(int thread, int threads) const {
    change(thread, threads, unpack_output);
    const Range blocks = split(blocks_, thread, threads);
    each_bias(blocks, [&](const Group& g, const Parameters& p, Index, Index at, Index i) {
      if (i < 0 || !p.bias_ih.data) return;
      static_cast<float*>(p.bias_ih.data)[i * p.bias_ih.unit] = g.bias_ih[at];
      static_cast<float*>(p.bias_hh.data)[i * p.bias_hh.unit] = g.bias_h[at];
    });
  }

 private:
  struct Group {
    Int8Matrix ih, hh, hn, hr;  // W_hh: the gates of the first product; W_hn: of the second
    float *bias_x = nullptr, *bias_h = nullptr;  // as ForwardWeights has them
    float* bias_ih = nullptr;                    // b_ih alone, for unpack()
  };

  // The thread's blocks of every matrix.
  template <class Change>
  void change(int thread, int threads, Change one) const {
    for (Index d = 0; d < layer_.directions; ++d) {
      const Group& g = group_[d];
      const Parameters& p = layer_.parameters[d];
      const Range blocks = split(blocks_, thread, threads);
      for (Index b = blocks.begin; b < blocks.end; ++b) {
        change_block(g.ih, b, p.weight_ih, layer_.H, 0, gates, one);
        change_block(g.hh, b, p.weight_hh, layer_.H, 0, first, one);
        if constexpr (K::two_products)
          change_block(g.hn, b, p.weight_hh, layer_.H, first, gates - first, one);
      }
      const Range outs = split(out_blocks_, thread, threads);
      for (Index b = outs.begin; b < outs.end; ++b)
        change_block(g.hr, b, p.weight_hr, layer_.O, 0, 1, one);
    }
  }

  // one(group, parameters, gate, place in a packed bias, place in a bias; negative: none)
  template <class One>
  void each_bias(const Range& blocks, One one) const {
    for (Index d = 0; d < layer_.directions; ++d)
      for (Index at = blocks.begin * vectors * lanes; at < blocks.end * vectors * lanes; ++at) {
        const Index b = at / (vectors * lanes), v = at / lanes % vectors, gate = v % gates;
        const Index unit = b * units + v / gates * lanes + at % lanes;
        one(group_[d], layer_.parameters[d], gate, at,
            unit < layer_.H ? gate * layer_.H + unit : -1);
      }
  }

  static float bias(const Weight& w, Index i) {
    return w.data && i >= 0 ? static_cast<const float*>(w.data)[i * w.unit] : 0.0f;
  }

  const Layer& layer_;
  const Index blocks_, out_blocks_;
  Group group_[2];
  std::size_t used_ = 0;
};

// ---- products -----------------------------------------------------------------------------------

// acc[r][n] += one step of the product.
template <int R, int N>
FASTRNN_INLINE void add_int8_step(Ints (&acc)[R][N], const Dot::Operand* rows, Index stride,
                                  const std::int8_t* w) {
  Dot::Weights weight[N];
#pragma GCC unroll 24
  for (int n = 0; n < N; ++n) weight[n] = Dot::weights(w + n * Vec<float>::lanes * Dot::depth);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    std::int32_t operands;
    __builtin_memcpy(&operands, rows + r * stride, sizeof(operands));
    const Ints x = Ints{} + operands;
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n] = Dot::multiply_add(x, weight[n], acc[r][n]);
  }
}

// sums[r][n] += scale · Σ of the rows from j on by block b of the matrix.
template <int R, int N>
FASTRNN_INLINE void add_int8_product(Vec<float> (&sums)[R][N], const QuantisedRows& rows, Index j,
                                     const Int8Matrix& m, Index b) {
  using V = Vec<float>;
  typedef std::uint32_t Words __attribute__((vector_size(FASTRNN_VECTOR_BYTES)));
  constexpr Index step = N * V::lanes * Dot::depth;
  constexpr bool two = R * N <= 6;  // too few sums to hide an instruction's latency: two of each
  const Index outputs = b * N * V::lanes;
  const Dot::Operand* x = rows.data + j * rows.stride;
  const std::int8_t* w = m.weights + b * m.block_size();
  Ints even[R][N], odd[R][N];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) {
      even[r][n] = Dot::offset != 0 ? load_ints(m.start + outputs + n * V::lanes) : Ints{};
      odd[r][n] = Ints{};
    }
  Index k = 0;
  if constexpr (two)
    for (; k + 2 <= m.steps; k += 2, w += 2 * step, x += 2 * Dot::depth) {
      add_int8_step(even, x, rows.stride, w);
      add_int8_step(odd, x + Dot::depth, rows.stride, w + step);
    }
  for (; k < m.steps; ++k, w += step, x += Dot::depth) add_int8_step(even, x, rows.stride, w);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) {
      const Ints sum = two ? (Ints)((Words)even[r][n] + (Words)odd[r][n]) : even[r][n];
      const V value(__builtin_convertvector(sum, V::Native));
      const V scale = V::load(m.scale + outputs + n * V::lanes);
      sums[r][n] = fma(value * V(rows.scale[j + r]), scale, sums[r][n]);
    }
}

// What forward.h calls, as for RowsInPlace.
template <int R, int N>
FASTRNN_INLINE Sums<R, N, float> multiplied(Vec<float> (&acc)[R][N], const QuantisedRows& x,
                                            Index j, Index, const Int8Block& w) {
  add_int8_product(acc, x, j, w.matrix, w.b);
  return Sums<R, N, float>(acc);
}
template <int R, int N, class Added>
FASTRNN_INLINE Sums<R, N, float> multiplied(Vec<float> (&acc)[R][N], const QuantisedRows& x,
                                            Index j, Index, const Int8Block& w, Added added) {
  add_int8_product(acc, x, j, w.matrix, w.b);
  add_each(acc, added);
  return Sums<R, N, float>(acc);
}

template <int R, int N>
FASTRNN_INLINE void multiply_into(float* to, Vec<float> (&acc)[R][N], const QuantisedRows& x,
                                  Index j, Index, const Int8Block& w) {
  add_int8_product(acc, x, j, w.matrix, w.b);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 24
    for (int n = 0; n < N; ++n) acc[r][n].store(to + (r * N + n) * Vec<float>::lanes);
}

}  // namespace fastrnn::FASTRNN_ISA
