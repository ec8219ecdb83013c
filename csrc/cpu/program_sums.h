// The sums over pairs of a program: gradients of weights and of vectors.
//
// A matrix of sums has lines and columns; columns are side by side where possible. The pairs run in
// blocks of kPairs: each is summed in registers, then added to the target, one block after the
// other. The blocks are cut from the blocks of steps, so the bits depend on T, B and the program.
// The lines (of vectors the columns) are divided among the threads. Each packs its own operands, so
// there is no barrier between two sums of different targets.
#pragma once

#include "program_products.h"

namespace fastrnn::FASTRNN_ISA {

template <class C>
struct SumScratch {
  static constexpr Index kPairs = 256;
  static constexpr int wide = 4, lines = rows_per_block(wide);
  static constexpr int panel_columns = wide * Vec<C>::lanes;

  const C **line_rows = nullptr, **column_rows = nullptr;  // [kPairs]
  C* packed = nullptr;                                     // [groups of lines][kPairs][lines]
  C* panel = nullptr;                                      // [kPairs][panel_columns]

  SumScratch() = default;
  SumScratch(Arena& arena, Index most_lines)
      : line_rows(arena.take<const C*>(kPairs)),
        column_rows(arena.take<const C*>(kPairs)),
        packed(arena.take<C>(ceil_div(most_lines, lines) * lines * kPairs)),
        panel(arena.take<C>(panel_columns * kPairs)) {}
};

// A matrix of sums: which operand makes its lines and which its columns.
struct SumMatrix {
  RowAt line, column;  // operands
  Index lines, columns, line_stride, column_stride, line_group, column_group;

  explicit SumMatrix(const PairSum& s) {
    const bool by_n = s.w_n == 1 && s.w_k != 1;  // the columns are d's elements
    line = by_n ? s.x : s.d;
    column = by_n ? s.d : s.x;
    lines = by_n ? s.K : s.N;
    columns = by_n ? s.N : s.K;
    line_stride = by_n ? s.w_k : s.w_n;
    column_stride = by_n ? s.w_n : s.w_k;
    line_group = by_n ? s.x_group : s.d_group;
    column_group = by_n ? s.d_group : s.x_group;
  }
};

template <class C>
class OuterSum {
  using V = Vec<C>;
  using Scratch = SumScratch<C>;
  static constexpr int lanes = V::lanes, R = Scratch::lines, wide = Scratch::wide;

 public:
  // `starts`: the target is written, not added to.
  OuterSum(const PairSum& sum, C* target, const Scratch& scratch, bool starts)
      : s_(sum), m_(sum), target_(target + sum.offset), scratch_(scratch), starts_(starts) {}

  // The rows of `pairs` pairs are in scratch, the operands' offsets not yet added.
  void add(Index pairs, int thread, int threads) {
    const Index groups = ceil_div(m_.lines, Index{R});  // of lines
    const bool shared = s_.w_group == 0;                // every group adds to the same sums
    const Range mine = split((shared ? 1 : s_.G) * groups, thread, threads);
    for (Index at = mine.begin; at < mine.end;) {
      const Index g = at / groups, end = least(mine.end, (g + 1) * groups);
      const Range lines{at - g * groups, end - g * groups};
      for (Index each = shared ? 0 : g; each < (shared ? s_.G : g + 1); ++each)
        add_group(each, lines, pairs);
      at = end;
    }
  }

 private:
  void add_group(Index g, const Range& groups, Index pairs) {
    pack_lines(m_.line.offset + g * m_.line_group, groups, pairs);
    for (Index column = 0; column < m_.columns; column += Scratch::panel_columns) {
      const Index vectors = ceil_div(least(m_.columns - column, Scratch::panel_columns), lanes);
      pack_panel(m_.column.offset + g * m_.column_group + column, m_.columns - column, vectors,
                 pairs);
      for (Index group = groups.begin; group < groups.end; ++group) {
        with_vectors(vectors, [&](auto n) FASTRNN_INLINE_LAMBDA {
          add_block<n.value>(g, group, column, pairs);
        });
      }
    }
  }

  void pack_lines(Index offset, const Range& groups, Index pairs) {
    constexpr Index kRun = 16;  // pairs whose rows stay in the cache for the next group
    for (Index begin = 0; begin < pairs; begin += kRun)
      for (Index group = groups.begin; group < groups.end; ++group) {
        const Index have = m_.lines - group * R, end = least(begin + kRun, pairs);
        C* to = packed(group) + begin * R;
        for (Index k = begin; k < end; ++k, to += R) {
          const C* from = scratch_.line_rows[k] + offset + group * R;
          if (have >= R)
            __builtin_memcpy(to, from, R * sizeof(C));
          else
            for (Index r = 0; r < R; ++r) to[r] = r < have ? from[r] : C(0);
        }
      }
  }
  C* packed(Index group) const { return scratch_.packed + group * R * Scratch::kPairs; }

  void pack_panel(Index offset, Index columns, Index vectors, Index pairs) {
    const Index width = (vectors == 3 ? 4 : vectors) * lanes;
    for (Index k = 0; k < pairs; ++k) {
      const C* from = scratch_.column_rows[k] + offset;
      C* to = scratch_.panel + k * width;
      for (Index v = 0; v < width; v += lanes) {
        const Index left = columns - v;
        (left > 0 ? load_most(from + v, left) : V(0)).store(to + v);
      }
    }
  }

  template <int N>
  FASTRNN_NOINLINE void add_block(Index g, Index group, Index column, Index pairs) {
    V acc[R][N];
    clear(acc);
    accumulate_packed<R, N>(acc, packed(group), R, pairs, scratch_.panel, N * lanes);
    const Sums<R, N, C> sums(acc);
    C* const to = target_ + g * s_.w_group + column * m_.column_stride;
    const bool starts = starts_ && (g == 0 || s_.w_group != 0);
    for (Index r = 0; r < least(R, m_.lines - group * R); ++r) {
      C* line = to + (group * R + r) * m_.line_stride;
      for (int n = 0; n < N; ++n) {
        const Index left = m_.columns - column - n * lanes;
        if (left <= 0) break;
        add_vector(sums.v[r][n], line + n * lanes * m_.column_stride, left, starts);
      }
    }
  }

  FASTRNN_INLINE void add_vector(V sum, C* to, Index left, bool starts) const {
    if (m_.column_stride == 1)
      return store_most(starts ? sum : load_most(to, left) + sum, to, left);
    C lane[lanes];
    sum.store(lane);
    for (Index i = 0; i < least(lanes, left); ++i) {
      C& element = to[i * m_.column_stride];
      element = starts ? lane[i] : element + lane[i];
    }
  }

  const PairSum& s_;
  const SumMatrix m_;
  C* target_;
  const Scratch& scratch_;
  bool starts_;
};

// The rows of `pairs` pairs are in scratch.line_rows; columns `mine` of the sum, whole vectors but
// for the last of them.
template <class C>
FASTRNN_NOINLINE void add_columns(const PairSum& s, C* target, const SumScratch<C>& scratch,
                                  bool starts, Index pairs, const Range& mine) {
  using V = Vec<C>;
  constexpr int lanes = V::lanes;
  in_blocks_of_rows<8>(ceil_div(mine.end - mine.begin, lanes), [&](auto count, Index first) {
    constexpr int N = count.value;
    const Index column = mine.begin + first * lanes, left = mine.end - column;
    V sum[1][N];
    clear(sum);
    for (Index k = 0; k < pairs; ++k) {
      const C* from = scratch.line_rows[k] + s.d.offset + column;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sum[0][n] = sum[0][n] + load_most(from + n * lanes, left - n * lanes);
    }
    C* to = target + s.offset + column;
    for (int n = 0; n < N; ++n, to += lanes) {
      const Index here = left - n * lanes;
      store_most(starts ? sum[0][n] : load_most(to, here) + sum[0][n], to, here);
    }
  });
}

}  // namespace fastrnn::FASTRNN_ISA
