// The product of one step: a few rows times packed weights, and the operation on each sum.
//
//   sum[d][row][plane][unit] = Σ_k operand(d, row)[k] · weight(d, plane, unit)[k]
//
// Layouts    weights [D][planes·units][depth] and operands [depth], both contiguous in k; depth is
//            a multiple of kUnitPadding, zero beyond the matrix. With several heads depth is that
//            of one head, and a unit's operand is its head's part of the row (Heads).
// Ownership  a block owns kWarps units of one direction and kTileRows rows; a warp owns a unit.
//            Each lane sums a part of k for every plane and row (in registers); the lanes' parts
//            are added in order; then one lane finishes each (row, unit). So a sum's bits depend
//            only on its own row, unit and depth.
// Cost       each block reads kWarps·planes·depth weights and kTileRows·depth operand values
//            through L2; one launch per step.
//
// Body:
//   static constexpr int planes;  using Weight, Operand (storage types), C (compute type)
//   Index directions() const, rows() const, units() const;
//   Index depth() const;
//   bool runs(Index d, Index row) const;          // false: the row's sums are ignored
//   const Weight* weight(Index d, int plane, Index unit) const;
//   const Operand* operand(Index d, Index row, Index unit) const;
//   void finish(Index d, Index row, Index unit, const C* sums) const;
#pragma once

#include "kernel.h"
#include "problem.h"
#include "storage.h"

namespace fastrnn::cuda {

// Four neighbouring values, read with one access.
template <class S>
struct alignas(4 * sizeof(S)) Four {
  S v[4];
};

// The units of a row divided among heads: head k owns the `own` units from k·own on. For a product
// that reads one head, each head's units are stored in `place` values, aligned, with zeros at the
// end.
struct Heads {
  Index count = 1, own = 0, place = 0;

  FASTRNN_CELL Index head(Index unit) const { return count == 1 ? 0 : unit / own; }
  FASTRNN_CELL Index at(Index unit) const {
    return count == 1 ? unit : unit / own * place + unit % own;
  }
  FASTRNN_CELL Index width() const { return count * place; }
};
inline Heads heads_of(Index units, Index count) {
  return {count, units / count, padded(units / count)};
}

template <class C>
constexpr int kTileRows = sizeof(C) == 8 ? 4 : 8;

template <class Body>
struct Product {
  static constexpr const char* name = Body::name;
  static constexpr int phases = 3;
  static constexpr int planes = Body::planes;
  using C = typename Body::C;
  static constexpr int rows = kTileRows<C>;
  static constexpr int sums = planes * rows;
  static_assert(sums <= kWarp, "one lane for each sum of a warp");

  // The lanes' parts for each sum of each warp; the last column holds their sum.
  struct Shared {
    C share[kWarps][sums][kWarp + 1];
  };
  using Registers = Nothing;

  Body body;

  Index unit_tiles() const { return ceil_div(body.units(), kWarps); }
  Index blocks() const { return body.directions() * ceil_div(body.rows(), rows) * unit_tiles(); }
  FASTRNN_CELL Index rounds() const { return 1; }

  // Units vary fastest, so that blocks of one row tile read the same operands.
  struct Place {
    Index d, row, unit;
  };
  FASTRNN_CELL Place place(Index block, int warp) const {
    const Index tiles = ceil_div(body.units(), kWarps);
    const Index row_tiles = ceil_div(body.rows(), rows);
    return {block / (tiles * row_tiles), block / tiles % row_tiles * rows,
            block % tiles * kWarps + warp};
  }

  template <int phase>
  FASTRNN_CELL void run(Index block, int thread, Index, Shared& shared, Registers&) const {
    const int warp = thread / kWarp, lane = thread % kWarp;
    const Place p = place(block, warp);
    if (p.unit >= body.units()) return;
    C(&share)[sums][kWarp + 1] = shared.share[warp];
    if constexpr (phase == 0) {
      multiply(p, lane, share);
    } else if constexpr (phase == 1) {
      if (lane >= sums) return;
      C sum = share[lane][0];
      for (int l = 1; l < kWarp; ++l) sum += share[lane][l];
      share[lane][kWarp] = sum;
    } else {
      if (lane >= rows || p.row + lane >= body.rows()) return;
      C total[planes];
      for (int g = 0; g < planes; ++g) total[g] = share[g * rows + lane][kWarp];
      body.finish(p.d, p.row + lane, p.unit, total);
    }
  }

 private:
  using Weight = typename Body::Weight;
  using Operand = typename Body::Operand;

  FASTRNN_CELL void multiply(const Place& p, int lane, C (&share)[sums][kWarp + 1]) const {
    C acc[planes][rows] = {};
    const Operand* operand[rows];
    bool any = false;
    FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) {  // rows beyond the last repeat it; their sums are not used
      const Index row = least(p.row + r, body.rows() - 1);
      operand[r] = body.operand(p.d, row, p.unit);
      any = any || body.runs(p.d, row);
    }
    const Index depth = any ? body.depth() : 0;
    const Weight* weight[planes];
    FASTRNN_UNROLL
    for (int g = 0; g < planes; ++g) weight[g] = body.weight(p.d, g, p.unit);
    for (Index k = 4 * lane; k < depth; k += 4 * kWarp) {
      Four<Weight> w[planes];
      FASTRNN_UNROLL
      for (int g = 0; g < planes; ++g) w[g] = *reinterpret_cast<const Four<Weight>*>(weight[g] + k);
      FASTRNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Four<Operand> x = *reinterpret_cast<const Four<Operand>*>(operand[r] + k);
        FASTRNN_UNROLL
        for (int j = 0; j < 4; ++j) {
          const C value = widen(x.v[j]);
          FASTRNN_UNROLL
          for (int g = 0; g < planes; ++g)
            acc[g][r] = std::fma(value, static_cast<C>(widen(w[g].v[j])), acc[g][r]);
        }
      }
    }
    FASTRNN_UNROLL
    for (int g = 0; g < planes; ++g) FASTRNN_UNROLL
    for (int r = 0; r < rows; ++r) share[g * rows + r][lane] = acc[g][r];
  }
};

// The same for sums that a library has computed: [D][rows][planes·width]; all zero if `sums` is
// null.
template <class Body>
struct Finish {
  static constexpr const char* name = Body::name;
  static constexpr int planes = Body::planes;
  using C = typename Body::C;
  Body body;
  const C* sums;
  Index width;  // units with sums; units beyond get zeros

  FASTRNN_CELL Index count() const { return body.directions() * body.rows() * body.units(); }
  FASTRNN_CELL void element(Index n) const {
    const Index unit = n % body.units(), pair = n / body.units();
    C total[planes];
    FASTRNN_UNROLL
    for (int g = 0; g < planes; ++g)
      total[g] = sums && unit < width ? sums[(pair * planes + g) * width + unit] : C(0);
    body.finish(pair / body.rows(), pair % body.rows(), unit, total);
  }
};

template <class Body>
void launch_product(void* stream, const Body& body) {
  launch(stream, Product<Body>{body});
}
template <class Body>
void launch_finish(void* stream, const Body& body, const typename Body::C* sums, Index width) {
  launch_elements(stream, Finish<Body>{body, sums, width});
}

// Packs weights in the order in which Product reads them: to[m][k], m < units, k < depth, from row
// m and column k of the matrix, or transposed, according to the strides. Zero beyond `columns`.
// With several heads m counts the units of all heads, for each gate, and row and column refer to
// the head's matrix.
template <class S>
struct PackWeights {
  static constexpr const char* name = "packing of weights";
  const S* from;
  Index from_m, from_k;  // strides
  Index units, columns, depth;
  S* to;
  Index to_m;  // stride
  Heads heads = {};
  Index from_head = 0, from_gate = 0;  // strides

  FASTRNN_CELL Index count() const { return units * depth; }
  FASTRNN_CELL void element(Index n) const {
    const Index m = n / depth, k = n % depth;
    to[m * to_m + k] = k < columns ? from[row(m) + k * from_k] : S{};
  }

  FASTRNN_CELL Index row(Index m) const {
    if (heads.count == 1) return m * from_m;
    const Index head = m / heads.own % heads.count, gate = m / heads.own / heads.count;
    return gate * from_gate + head * from_head + m % heads.own * from_m;
  }
};

template <class T>
struct Fill {
  static constexpr const char* name = "zeros";
  T* to;
  Index size;

  FASTRNN_CELL Index count() const { return size; }
  FASTRNN_CELL void element(Index n) const { to[n] = T{}; }
};

}  // namespace fastrnn::cuda
