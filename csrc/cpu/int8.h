// One step of one layer with int8 products.
//
// Weights       each row w of a matrix by itself: scale s_w = max|w| / 127, q_w = round(w / s_w).
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
//               saved    [row][planes · Hp]. Reset-before GRU: the cell's saved values, then the
//               projected gates that the second product is added to. Projection: the hidden units
// Threads       each computes a run of blocks of units, for all rows, and rounds the operands for
//               itself. There is a barrier before a second product.
// Cost          per step and row G·H·(I + O) products, a byte each from the cache for each block of
//               rows.
#pragma once

#include "../cells/list.h"
#include "int8_layer.h"
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

// 2^23 · 1.5: adding a number to it rounds that to an integer, in the low bits.
inline constexpr float kRounder = 12582912.0f;
inline constexpr float kLeastInt8 = 1e-30f;

// Scale and its inverse for a row whose largest absolute value is `most`.
struct Int8Scale {
  float scale, inverse;
};
FASTRNN_INLINE Int8Scale int8_scale(float most) {
  if (!(most <= __FLT_MAX__)) return {__builtin_nanf(""), 0};
  if (most < kLeastInt8) return {0, 0};
  return {most / 127.0f, 127.0f / most};
}

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
inline void pack_int8_output(const Int8Matrix& m, Index b, Index lane, const Weight& w, Index row) {
  const Index outputs = m.vectors * Vec<float>::lanes;
  std::int8_t* to = m.weights + b * m.block_size() + lane * Dot::depth;
  const float* from = static_cast<const float*>(w.data) + (row < 0 ? 0 : row * w.row);
  std::uint32_t most = 0;
  for (Index k = 0; row >= 0 && k < m.K; ++k) {
    const std::uint32_t bits = as_bits(from[k * w.unit]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  const Int8Scale s = int8_scale(as_float(most));
  std::int32_t sum = 0;
  for (Index k = 0; k < m.steps * Dot::depth; ++k) {
    std::int32_t q = 0;
    if (s.inverse != 0 && k < m.K) {
      const float scaled = from[k * w.unit] * s.inverse;
      q = static_cast<std::int32_t>(scaled + kRounder - kRounder);
    }
    sum += q;
    to[k / Dot::depth * outputs * Dot::depth + k % Dot::depth] = static_cast<std::int8_t>(q);
  }
  m.scale[b * outputs + lane] = s.scale;
  if (m.start) m.start[b * outputs + lane] = -Dot::offset * sum;
}

// Packs one block of gates first … first + gates − 1 of W [.., K], as pack_gates() does: `units`
// rows to a gate.
inline void pack_int8(const Int8Matrix& m, Index b, const Weight& w, Index units, Index first,
                      Index gates) {
  constexpr Index lanes = Vec<float>::lanes;
  const Index tiles = m.vectors / gates;
  for (Index v = 0; v < m.vectors; ++v)
    for (Index lane = 0; lane < lanes; ++lane) {
      const Index unit = (b * tiles + v / gates) * lanes + lane;
      const Index row = unit < units ? (first + v % gates) * units + unit : -1;
      pack_int8_output(m, b, v * lanes + lane, w, row);
    }
}

template <class Cell>
class Int8Packing : Tiling<Cell, float> {
  using K = Tiling<Cell, float>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::units, K::first, K::wide;

 public:
  Int8Packing(const Int8Layer& layer, void* base)
      : layer_(layer),
        blocks_(ceil_div(layer.H, units)),
        out_blocks_(layer.P ? ceil_div(layer.O, wide * lanes) : 0) {
    Arena arena(base);
    ih.lay_out(arena, blocks_, layer.I, vectors);
    hh.lay_out(arena, blocks_, layer.O, first * tiles);
    if (layer.P)
      hr.lay_out(arena, out_blocks_, layer.H, wide);
    else if (K::two_products)
      hn.lay_out(arena, blocks_, layer.H, (gates - first) * tiles);
    bias_x = arena.take<float>(blocks_ * vectors * lanes);
    bias_h = arena.take<float>(blocks_ * vectors * lanes);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void pack(int thread, int threads) const {
    const Parameters& p = *layer_.parameters;
    const Range blocks = split(blocks_, thread, threads);
    for (Index b = blocks.begin; b < blocks.end; ++b) {
      pack_int8(ih, b, p.weight_ih, layer_.H, 0, gates);
      pack_int8(hh, b, p.weight_hh, layer_.H, 0, first);
      if constexpr (K::two_products) pack_int8(hn, b, p.weight_hh, layer_.H, first, gates - first);
      pack_biases(b);
    }
    const Range outs = split(out_blocks_, thread, threads);
    for (Index b = outs.begin; b < outs.end; ++b) pack_int8(hr, b, p.weight_hr, layer_.O, 0, 1);
  }

  Int8Matrix ih, hh, hn, hr;  // W_hh: the gates of the first product; W_hn: those of the second
  float *bias_x, *bias_h;

 private:
  void pack_biases(Index b) const {
    for (Index v = 0; v < vectors; ++v)
      for (Index lane = 0; lane < lanes; ++lane) {
        const Index gate = v % gates, unit = b * units + v / gates * lanes + lane;
        const Index to = (b * vectors + v) * lanes + lane;
        const float input = bias(layer_.parameters->bias_ih, gate, unit);
        const float hidden = bias(layer_.parameters->bias_hh, gate, unit);
        bias_x[to] = Cell::separate[gate] ? input : input + hidden;
        bias_h[to] = hidden;
      }
  }

  float bias(const Weight& w, Index gate, Index unit) const {
    if (!w.data || unit >= layer_.H) return 0;
    return static_cast<const float*>(w.data)[(gate * layer_.H + unit) * w.unit];
  }

  const Int8Layer& layer_;
  const Index blocks_, out_blocks_;
  std::size_t used_ = 0;
};

// ---- the step -----------------------------------------------------------------------------------

// Rows of operands beside each other, with their scales.
struct Int8Rows {
  Dot::Operand* data;
  float* scale;
  Index stride;
};

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
FASTRNN_INLINE void add_int8_product(Vec<float> (&sums)[R][N], const Int8Rows& rows, Index j,
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

template <class Cell>
class Int8Step : Tiling<Cell, float> {
  using K = Tiling<Cell, float>;
  using K::lanes, K::gates, K::tiles, K::vectors, K::rows, K::units, K::first, K::wide;
  using typename K::V;

 public:
  Int8Step(const Int8Layer& layer, void* base)
      : layer_(layer),
        Hp_(padded(layer.H)),
        blocks_(ceil_div(layer.H, units)),
        packing_(layer, layer.packed) {
    Arena arena(base);
    const Index B = layer.B;
    if (layer.P) width_ = Hp_;
    if (K::two_products) width_ = (Cell::saved + gates - first) * Hp_;
    saved_ = arena.take<float>(B * width_);
    Arena own(nullptr);
    lay_out_thread(own);
    thread_bytes_ = static_cast<Index>(own.used());
    threads_ = arena.take<char>(layer.threads * thread_bytes_);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run(int thread, int threads) {
    const FlushSubnormals guard;
    Arena own(threads_ + thread * thread_bytes_);
    lay_out_thread(own);
    take_input();
    for (Index i = 0; i < layer_.B; ++i) quantise(h_, i, layer_.h + i * layer_.O, layer_.O);
    const Range blocks = split(blocks_, thread, threads);
    for (Index b = blocks.begin; b < blocks.end; ++b) first_product(b);
    if constexpr (Cell::projects) {
      if (!layer_.P) return;
      layer_.team->wait(threads, layer_.wait);
      second_operands(layer_.H, 0);
      const Range outs = split(ceil_div(layer_.O, wide * lanes), thread, threads);
      for (Index b = outs.begin; b < outs.end; ++b) project_hidden(b);
    } else if constexpr (K::two_products) {
      layer_.team->wait(threads, layer_.wait);
      second_operands(layer_.H, Cell::operand);
      for (Index b = blocks.begin; b < blocks.end; ++b) second_product(b);
    }
  }

 private:
  void lay_out_thread(Arena& own) {
    const Index B = layer_.B, widest = int8_row(most(layer_.I, layer_.H));
    x_ = {own.take<Dot::Operand>(B * widest), own.take<float>(B), widest};
    h_ = {own.take<Dot::Operand>(B * int8_row(layer_.O)), own.take<float>(B), int8_row(layer_.O)};
    row_ = layer_.input.unit != 1 ? own.take<float>(layer_.I) : nullptr;
  }

  static void quantise(const Int8Rows& rows, Index i, const float* x, Index count) {
    rows.scale[i] = quantise_row(rows.data + i * rows.stride, x, count);
  }

  void take_input() {
    const Sequence& input = layer_.input;
    for (Index i = 0; i < layer_.B; ++i) {
      const float* x = static_cast<const float*>(input.data) + i * input.row;
      if (row_) {
        gather(row_, x, input.unit, layer_.I);
        x = row_;
      }
      quantise(x_, i, x, layer_.I);
    }
  }

  // Over x, which no product reads any more.
  void second_operands(Index count, Index plane) {
    for (Index i = 0; i < layer_.B; ++i) quantise(x_, i, saved_ + i * width_ + plane * Hp_, count);
  }

  void first_product(Index b) {
    constexpr int N = first * tiles;
    const float* bias_x = packing_.bias_x + b * vectors * lanes;
    const float* bias_h = packing_.bias_h + b * vectors * lanes;
    in_blocks_of_rows<rows>(layer_.B, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V x[R][vectors], a[R][N];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < vectors; ++v) x[r][v] = V::load(bias_x + v * lanes);
      add_int8_product(x, x_, j, packing_.ih, b);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) {
          const int from = v / first * gates + v % first;
          a[r][v] = Cell::separate[v % first] ? V::load(bias_h + from * lanes) : x[r][from];
        }
      add_int8_product(a, h_, j, packing_.hh, b);
      for (int r = 0; r < R; ++r)
        for (int tile = 0; tile < tiles; ++tile) {
          const Index unit = b * units + tile * lanes;
          if (unit < layer_.H) finish_first(j + r, unit, a[r] + tile * first, x[r] + tile * gates);
        }
    });
  }

  // The cell, or its first half, on one tile of one row. a: the gates' sums; x: the projection.
  FASTRNN_NOINLINE void finish_first(Index i, Index unit, const V* a, const V* x) {
    const Index left = layer_.H - unit;
    V saved[Cell::saved], previous[2], next[2];
    previous[0] = layer_.P ? V(0) : load_units<float>(layer_.h + i * layer_.O + unit, left);
    float* keep = saved_ + i * width_ + unit;
    if constexpr (K::two_products) {
      Cell::forward_first(layer_.maths, a, previous, saved);
      for (int s = 0; s < Cell::saved; ++s) saved[s].store(keep + s * Hp_);
      for (int g = first; g < gates; ++g) x[g].store(keep + (Cell::saved + g - first) * Hp_);
    } else {
      if constexpr (Cell::states > 1)
        previous[1] = load_units<float>(layer_.c + i * layer_.H + unit, left);
      Cell::forward(layer_.maths, x, a, previous, next, saved);
      if constexpr (Cell::states > 1) store_units(next[1], layer_.c_n + i * layer_.H + unit, left);
      if (layer_.P)
        next[0].store(keep);
      else
        finish_hidden(i, unit, next[0]);
    }
  }

  // Reset-before GRU: the gates that read r∘h.
  void second_product(Index b) {
    constexpr int G = gates - first, N = G * tiles;
    in_blocks_of_rows<rows>(layer_.B, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V a[R][N];
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < N; ++v) {
          const Index unit = b * units + v / G * lanes, plane = Cell::saved + v % G;
          a[r][v] =
              unit < layer_.H ? V::load(saved_ + (j + r) * width_ + plane * Hp_ + unit) : V(0);
        }
      add_int8_product(a, x_, j, packing_.hn, b);
      for (int r = 0; r < R; ++r)
        for (int tile = 0; tile < tiles; ++tile) {
          const Index unit = b * units + tile * lanes;
          if (unit < layer_.H) finish_second(j + r, unit, a[r] + tile * G);
        }
    });
  }

  FASTRNN_NOINLINE void finish_second(Index i, Index unit, const V* a) {
    const float* keep = saved_ + i * width_ + unit;
    V saved[Cell::saved], next[1];
    const V previous[1] = {load_units<float>(layer_.h + i * layer_.O + unit, layer_.H - unit)};
    for (int s = 0; s < Cell::saved; ++s) saved[s] = V::load(keep + s * Hp_);
    Cell::forward_second(layer_.maths, a, previous, next, saved);
    finish_hidden(i, unit, next[0]);
  }

  // h = W_hr · hidden units.
  void project_hidden(Index b) {
    in_blocks_of_rows<K::wide_rows>(layer_.B, [&](auto count, Index j) {
      constexpr int R = decltype(count)::value;
      V h[R][wide];
      clear(h);
      add_int8_product(h, x_, j, packing_.hr, b);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < wide; ++v) {
          const Index unit = (b * wide + v) * lanes;
          if (unit < layer_.O) finish_hidden(j + r, unit, h[r][v]);
        }
    });
  }

  FASTRNN_INLINE void finish_hidden(Index i, Index unit, V h) {
    const Index at = i * layer_.O + unit, left = layer_.O - unit;
    store_units(h, layer_.h_n + at, left);
    if (layer_.output) store_units(h, layer_.output + at, left);
  }

  const Int8Layer& layer_;
  const Index Hp_, blocks_;
  const Int8Packing<Cell> packing_;
  Index width_ = 0, thread_bytes_ = 0;
  float* saved_ = nullptr;
  char* threads_ = nullptr;
  std::size_t used_ = 0;
  // The thread's own.
  Int8Rows x_{}, h_{};
  float* row_ = nullptr;
};

// ---- the table ----------------------------------------------------------------------------------

template <class Cells>
struct Int8Table;
template <class... Cells>
struct Int8Table<CellList<Cells...>> {
  static constexpr Int8Kernels kernels[] = {
      {Vec<float>::lanes, Dot::depth, Tiling<Cells, float>::rows, Tiling<Cells, float>::units,
       bytes_of<Int8Packing<Cells>>, bytes_of<Int8Step<Cells>>, pack_weights<Int8Packing<Cells>>,
       run_pass<Int8Step<Cells>>}...};
};

}  // namespace fastrnn::FASTRNN_ISA
