// Pointwise runs: operation after operation over a tile of rows and columns, so small that the tile
// registers stay in the first-level cache. One function call for each operation and tile.
//
// An operand is a row of vectors, or one vector for the whole row (a splat): a constant, or one
// element of each row. Lanes beyond the end of a row are neither read nor written.
#pragma once

#include "program_rows.h"

namespace fastrnn::FASTRNN_ISA {

template <class C>
struct PointArguments {  // of one operation on a tile
  C* to;
  Index to_row;  // between rows
  const C* from[3];
  Index from_row[3], from_step[3];  // between rows, between vectors
  Index rows, whole, rest;          // whole vectors of a row, lanes beyond them
};
template <class C>
using PointFunction = void (*)(const PointArguments<C>&);

// The value as a half type holds it.
template <class S>
FASTRNN_INLINE Vec<float> rounded_to(Vec<float> x) {
  return rounded<S>(x);
}
template <class S>
FASTRNN_INLINE Vec<double> rounded_to(Vec<double> x) {
  for (int i = 0; i < Vec<double>::lanes; ++i) {
    S half;
    narrow(static_cast<float>(x.v[i]), &half);
    x.v[i] = widen(half);
  }
  return x;
}

template <Point Code, class V>
FASTRNN_INLINE V point(V a, V b, V c) {
  using Bits = typename V::Bits;
  using T = decltype(a.v[0] + a.v[0]);
  if constexpr (Code == Point::copy) return a;
  if constexpr (Code == Point::neg) return negated(a);
  if constexpr (Code == Point::abs) return absolute(a);
  if constexpr (Code == Point::sign) return sign(a);
  if constexpr (Code == Point::reciprocal) return V(1) / a;
  if constexpr (Code == Point::sqrt) return sqrt(a);
  if constexpr (Code == Point::rsqrt) return V(1) / sqrt(a);
  if constexpr (Code == Point::exp) return exp(a);
  if constexpr (Code == Point::expm1) return expm1(a);
  if constexpr (Code == Point::log) return log(a);
  if constexpr (Code == Point::log1p) return log1p(a);
  if constexpr (Code == Point::sin) return sin(a);
  if constexpr (Code == Point::cos) return cos(a);
  if constexpr (Code == Point::erf) return erf(a);
  if constexpr (Code == Point::sigmoid) return sigmoid(a);
  if constexpr (Code == Point::tanh) return fastrnn::tanh(a);
  if constexpr (Code == Point::relu) return maximum(a, V(0));
  if constexpr (Code == Point::softplus1) return softplus1(a);
  if constexpr (Code == Point::bfloat16) return rounded_to<Bf16>(a);
  if constexpr (Code == Point::float16) return rounded_to<F16>(a);
  if constexpr (Code == Point::add) return a + b;
  if constexpr (Code == Point::sub) return a - b;
  if constexpr (Code == Point::mul) return a * b;
  if constexpr (Code == Point::div) return a / b;
  if constexpr (Code == Point::maximum) return larger(a, b);
  if constexpr (Code == Point::minimum) return smaller(a, b);
  if constexpr (Code == Point::lt) return truth<T>((Bits)(a.v < b.v));
  if constexpr (Code == Point::le) return truth<T>((Bits)(a.v <= b.v));
  if constexpr (Code == Point::gt) return truth<T>((Bits)(a.v > b.v));
  if constexpr (Code == Point::ge) return truth<T>((Bits)(a.v >= b.v));
  if constexpr (Code == Point::eq) return truth<T>((Bits)(a.v == b.v));
  if constexpr (Code == Point::ne) return truth<T>((Bits)(a.v != b.v));
  if constexpr (Code == Point::where) return select((Bits)(a.v != V(0).v), b, c);
  if constexpr (Code == Point::fma) return fma(a, b, c);
  if constexpr (Code == Point::normalize) return (a - b) * c;
  if constexpr (Code == Point::tanh_grad) return a * (V(1) - b * b);
  if constexpr (Code == Point::sigmoid_grad) return a * (V(1) - b) * b;
}

template <class C, Point Code>
FASTRNN_NOINLINE void point_tile(const PointArguments<C>& p) {
  using V = Vec<C>;
  constexpr int operands = kPointNames[static_cast<int>(Code)].operands;
  for (Index r = 0; r < p.rows; ++r) {
    const C* a = p.from[0] + r * p.from_row[0];
    const C* b = operands > 1 ? p.from[1] + r * p.from_row[1] : nullptr;
    const C* c = operands > 2 ? p.from[2] + r * p.from_row[2] : nullptr;
    C* to = p.to + r * p.to_row;
    for (Index v = 0; v < p.whole; ++v) {
      const V x = V::load(a), y = operands > 1 ? V::load(b) : x, z = operands > 2 ? V::load(c) : x;
      point<Code>(x, y, z).store(to);
      a += p.from_step[0];
      if constexpr (operands > 1) b += p.from_step[1];
      if constexpr (operands > 2) c += p.from_step[2];
      to += V::lanes;
    }
    if (p.rest > 0) {
      const V x = load_first(a, p.rest), y = operands > 1 ? load_first(b, p.rest) : x;
      const V z = operands > 2 ? load_first(c, p.rest) : x;
      store_first(point<Code>(x, y, z), to, p.rest);
    }
  }
}

template <class C, class Codes>
struct PointTable;
template <class C, int... Code>
struct PointTable<C, std::integer_sequence<int, Code...>> {
  static constexpr PointFunction<C> functions[] = {point_tile<C, static_cast<Point>(Code)>...};
};
template <class C>
using Points = PointTable<C, std::make_integer_sequence<int, kPoints>>;

// An operand with its place in a chunk.
template <class C>
struct PlacedOperand {
  C* data = nullptr;
  Index row = 0, step = 0;  // between rows, between vectors
  bool moves = false;       // along the rows and columns of the run; else its tile stays in place
  // One element of each row, `every` apart from this one on: splat to `data` for each tile.
  const C* elements = nullptr;
  Index every = 0;
};
template <class C>
struct PlacedPoint {
  PointFunction<C> function;
  PlacedOperand<C> to, from[3];
  int operands;
};

// A thread's scratch for runs: sized for the largest of a program.
template <class C>
struct PointScratch {
  static constexpr Index kTile = (16 << 10) / sizeof(C);  // elements of all registers
  static constexpr Index kRows = 16;                      // of a tile

  PlacedPoint<C>* placed = nullptr;  // [operations]
  C* registers = nullptr;            // [kTile]
  C* splats = nullptr;               // [scalar operands][kRows][lanes]

  PointScratch() = default;
  PointScratch(Arena& arena, Index operations, Index scalars)
      : placed(arena.take<PlacedPoint<C>>(operations)),
        registers(arena.take<C>(kTile)),
        splats(arena.take<C>(scalars * kRows * Vec<C>::lanes)) {}
};

template <class C>
class Run {
  using V = Vec<C>;
  static constexpr int lanes = V::lanes;

 public:
  // `constants`: [..][lanes].
  Run(const ProgramPlan& plan, const PointwiseRun& run, const PointScratch<C>& scratch,
      const Place<C>* places, const C* constants)
      : plan_(plan), run_(run), scratch_(scratch), places_(places), constants_(constants) {
    Index registers = 1;
    for (Index i = 0; i < run.count; ++i) {
      const PointOperand& to = op(i).to;
      const ProgramValue& v = plan.values.data[to.at.value];
      if (v.home == Home::tile) registers = most(registers, v.index + 1);
    }
    const Index elements = PointScratch<C>::kTile / registers / lanes * lanes;  // of a register
    columns_ = least(ceil_div(run.width, lanes) * lanes, elements);
    rows_ = least(elements / columns_, PointScratch<C>::kRows);
  }

  // Runs over a chunk, for `columns` of the run: whole vectors but for the last of them.
  void over(const Chunk& chunk, const Range& columns) {
    const bool along_steps = chunk.rows < chunk.steps;
    const Index lines = along_steps ? chunk.rows : chunk.steps;
    for (Index line = 0; line < lines; ++line) {
      place(along_steps, line);
      line_of_tiles(along_steps ? chunk.steps : chunk.rows, columns);
    }
  }

 private:
  const PointOp& op(Index i) const { return plan_.points.data[run_.first + i]; }

  // The operands along one line: the pairs of a step, or of a row.
  void place(bool along_steps, Index line) {
    C* splats = scratch_.splats;
    for (Index i = 0; i < run_.count; ++i) {
      PlacedPoint<C>& p = scratch_.placed[i];
      p.function = Points<C>::functions[static_cast<int>(op(i).code)];
      p.operands = kPointNames[static_cast<int>(op(i).code)].operands;
      p.to = placed(op(i).to, along_steps, line, splats);
      for (int j = 0; j < p.operands; ++j)
        p.from[j] = placed(op(i).from[j], along_steps, line, splats);
    }
  }

  PlacedOperand<C> placed(const PointOperand& operand, bool along_steps, Index line,
                          C*& splats) const {
    PlacedOperand<C> p;
    if (operand.kind == PointOperand::Kind::constant) {
      p.data = const_cast<C*>(constants_) + operand.at.offset * lanes;
      return p;
    }
    const ProgramValue& v = plan_.values.data[operand.at.value];
    if (v.home == Home::tile) {
      p.data = scratch_.registers + v.index * rows_ * columns_;
      p.row = columns_;
      p.step = lanes;
      return p;
    }
    const Place<C>& place = places_[operand.at.value];
    C* const at = place.base + line * (along_steps ? place.row : place.step) + operand.at.offset;
    const Index every = along_steps ? place.step : place.row;
    if (operand.kind == PointOperand::Kind::scalar) {
      p.elements = at;
      p.every = every;
      p.data = splats;
      p.row = lanes;
      splats += PointScratch<C>::kRows * lanes;
    } else {
      p.data = at;
      p.row = every;
      p.step = lanes;
      p.moves = true;
    }
    return p;
  }

  void line_of_tiles(Index pairs, const Range& columns) {
    for (Index r = 0; r < pairs; r += rows_) {
      const Index rows = least(rows_, pairs - r);
      splat(r, rows);
      for (Index c = columns.begin; c < columns.end; c += columns_)
        tile(r, rows, c, least(columns_, columns.end - c));
    }
  }

  void splat(Index first, Index rows) {
    for (Index i = 0; i < run_.count; ++i)
      for (int j = 0; j < scratch_.placed[i].operands; ++j) {
        const PlacedOperand<C>& p = scratch_.placed[i].from[j];
        if (!p.elements) continue;
        for (Index r = 0; r < rows; ++r)
          V(p.elements[(first + r) * p.every]).store(p.data + r * lanes);
      }
  }

  FASTRNN_INLINE static C* start(const PlacedOperand<C>& p, Index row, Index column) {
    return p.moves ? p.data + row * p.row + column : p.data;
  }

  void tile(Index row, Index rows, Index column, Index columns) {
    PointArguments<C> a;
    a.rows = rows;
    a.whole = columns / lanes;
    a.rest = columns % lanes;
    for (Index i = 0; i < run_.count; ++i) {
      const PlacedPoint<C>& p = scratch_.placed[i];
      a.to = start(p.to, row, column);
      a.to_row = p.to.row;
      for (int j = 0; j < p.operands; ++j) {
        a.from[j] = start(p.from[j], row, column);
        a.from_row[j] = p.from[j].row;
        a.from_step[j] = p.from[j].step;
      }
      p.function(a);
    }
  }

  const ProgramPlan& plan_;
  const PointwiseRun& run_;
  const PointScratch<C>& scratch_;
  const Place<C>* places_;
  const C* constants_;
  Index columns_, rows_;  // of a tile
};

}  // namespace fastrnn::FASTRNN_ISA
