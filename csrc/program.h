// One step of a recurrence as a list of operations over rows, run over all steps of a sequence.
//
// A program is data: built elsewhere, checked once (the constructor of Program), then run any
// number of times. The same executor runs a recurrence forward and backward: the backward of a step
// is another program, run in the other direction, and the gradients of weights are its sums over
// pairs.
//
// Sizes      T steps, B rows; a pair is one (step, row). Offsets and strides count elements.
// Values     For each pair, `width` elements of the dtype, float32 or float64. Home says where they
//            are stored.
// Phases     The steps run in blocks, t = 0 … T − 1 or, with `reverse`, T − 1 … 0. In each block:
//            `before` over all its pairs at once, then `step` over the rows, step after step, then
//            `after` over all its pairs, then the pair sums. The length of a block depends on the
//            program, T and B alone.
// Results    A row's bits depend on that row and the shared values alone. Those of a pair sum
//            depend on T and B, never on the number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "problem.h"

namespace fastrnn {

enum class Home : std::uint8_t {
  shared,    // the caller's shared[index], the same for every row
  sequence,  // the caller's sequences[index] at step + `previous`; where there is no such step, the
             // caller's firsts[index]
  fixed,     // the caller's fixed[index], (B, width), the same at every step; read only
  carry,     // state `index` before the step; read only, in `step` alone
  next,      // state `index` after the step; in `step` alone
  block,     // scratch of all pairs of a block of steps
  local,     // scratch within one phase of one step
  tile,      // register `index` of a pointwise run
};
inline constexpr const char* kHomeNames[] = {"shared", "sequence", "fixed", "carry",
                                             "next",   "block",    "local", "tile"};

struct ProgramValue {
  Home home = Home::local;
  std::int64_t index = 0;
  std::int64_t width = 0;
  int previous = 0;  // −1, 0 or 1, of a sequence
};

inline constexpr int kTileRegisters = 32;

// A value from an offset on; no value: −1.
struct RowAt {
  int value = -1;
  std::int64_t offset = 0;
};

// out[o + g·out_group + n] = init + Σ_k in[i + g·in_group + k] · W[w + g·w_group + k·w_k + n·w_n]
// for g < G, n < N; k runs from 0 to K − 1. init: none, or init[offset + g·out_group + n] of a row
// or a shared vector. W is a shared value; its width is ignored.
struct Product {
  RowAt out, in, weight, init;
  std::int64_t G = 1, out_group = 0, in_group = 0, w_group = 0, w_k = 0, w_n = 0, K = 0, N = 0;
};

// Pointwise operations on `width` elements, one after the other.
struct PointwiseRun {
  std::int64_t width = 0;
  std::int64_t first = 0, count = 0;  // of Program::points
};

// sum, maximum  out[o + g] = Σ, or the maximum, of in[i + g·segment + j·element] over j < n, g < G
// Of one row of n contiguous elements (G = 1, element = 1):
// moments       out[o], out[o + 1] = the mean of in, and 1 / √(variance + kMomentsEpsilon)
// means         out[o], out[o + 1] = the means of in, and of in·second
struct Reduce {
  enum class Kind : std::uint8_t { sum, maximum, moments, means } kind = Kind::sum;
  RowAt out, in;
  std::int64_t G = 1, segment = 0, n = 0, element = 1;
  RowAt second;

  bool of_row() const { return kind == Kind::moments || kind == Kind::means; }
};
inline constexpr double kMomentsEpsilon = 1e-5;

// out[o + i] = Σ of in[i + index] over the indices that the table lists for i < count.
struct Collect {
  RowAt out, in;
  std::int64_t count = 0;
  int table = 0;
};

struct Instruction {
  enum class Kind : std::uint8_t { product, run, reduce, collect } kind = Kind::run;
  static constexpr const char* kNames[] = {"product", "run", "reduce", "collect"};
  Product product;
  PointwiseRun run;
  Reduce reduce;
  Collect collect;
};

// In the order of kPointNames.
enum class Point : std::uint8_t {
  copy,
  neg,
  abs,
  sign,
  reciprocal,
  sqrt,
  rsqrt,
  exp,
  expm1,
  log,
  log1p,
  sin,
  cos,
  erf,
  sigmoid,
  tanh,
  relu,
  softplus1,
  bfloat16,
  float16,
  add,
  sub,
  mul,
  div,
  maximum,
  minimum,
  lt,
  le,
  gt,
  ge,
  eq,
  ne,
  tanh_grad,
  sigmoid_grad,
  where,
  fma,
  normalize,
};
// Comparisons give 1 or 0. where(c, a, b): a where c is not 0. fma(a, b, c) = a·b + c.
// normalize(a, b, c) = (a − b)·c. tanh_grad(d, y) = d·(1 − y²), sigmoid_grad(d, y) = d·(1 − y)·y.
// softplus1(x) = log(1 + e^x). bfloat16 and float16 round to that type. maximum, minimum and relu
// return NaN for NaN; sign returns 0.
struct PointName {
  const char* name;
  int operands;
};
inline constexpr PointName kPointNames[] = {
    {"copy", 1},    {"neg", 1},      {"abs", 1},       {"sign", 1},         {"reciprocal", 1},
    {"sqrt", 1},    {"rsqrt", 1},    {"exp", 1},       {"expm1", 1},        {"log", 1},
    {"log1p", 1},   {"sin", 1},      {"cos", 1},       {"erf", 1},          {"sigmoid", 1},
    {"tanh", 1},    {"relu", 1},     {"softplus1", 1}, {"bfloat16", 1},     {"float16", 1},
    {"add", 2},     {"sub", 2},      {"mul", 2},       {"div", 2},          {"maximum", 2},
    {"minimum", 2}, {"lt", 2},       {"le", 2},        {"gt", 2},           {"ge", 2},
    {"eq", 2},      {"ne", 2},       {"tanh_grad", 2}, {"sigmoid_grad", 2}, {"where", 3},
    {"fma", 3},     {"normalize", 3}};
inline constexpr int kPoints = sizeof(kPointNames) / sizeof(kPointNames[0]);

struct PointOperand {
  enum class Kind : std::uint8_t {
    absent,
    vector,    // `width` elements of the value from the offset on
    scalar,    // the one element there, for all columns
    constant,  // constants[offset]
  } kind = Kind::absent;
  RowAt at;
};

struct PointOp {
  Point code = Point::copy;
  PointOperand to, from[3];
};

// Sums over all pairs of the sequence, added to one of the caller's gradients, which starts at 0.
//   outer     target[off + g·w_group + k·w_k + n·w_n]
//                 += Σ d[o + g·d_group + n]·x[i + g·x_group + k]
//   columns   target[off + n] += Σ d[o + n], n < N
// d and x are sequence, fixed or block values.
struct PairSum {
  bool outer = false;
  int target = 0;
  std::int64_t offset = 0;
  RowAt d, x;
  std::int64_t G = 1, d_group = 0, x_group = 0, w_group = 0, w_k = 0, w_n = 0, K = 1, N = 0;
  // The first to add to its elements, which it therefore writes: set by the check of a program.
  bool starts = false;
};

// The indices of a collect, listed row by row: those of output i are indices[starts[i]] …
// indices[starts[i + 1] − 1].
struct ProgramTable {
  std::vector<std::int64_t> starts, indices;
};

// Consecutive outputs of a collect of the same kind.
struct Piece {
  enum class Kind : std::uint8_t { zeros, copy, sums } kind = Kind::zeros;
  std::int64_t begin = 0, count = 0;
  std::int64_t from = 0;  // copy: the first one's index; sums: where its indices are listed
};

struct ProgramText {
  DType dtype = DType::f32;  // f32 or f64
  std::vector<ProgramValue> values;
  std::vector<Instruction> phases[3];  // before, step, after
  std::vector<PointOp> points;
  std::vector<double> constants;
  std::vector<ProgramTable> tables;
  std::vector<PairSum> sums;
};

enum Phase { kBefore, kStep, kAfter, kPhases };

// The part of one of the caller's arrays that a program accesses.
struct Reach {
  std::int64_t low = 0, high = -1;  // offsets from the first element; none where high < low
  std::int64_t contiguous = 0;      // elements that must be contiguous: used pointwise
};

// Elements begin … end − 1 of a gradient, which no pair sum starts; end −1: the end of the array.
struct Gap {
  int target = 0;
  std::int64_t begin = 0, end = -1;
};

// A checked program. Immutable: threads may run it concurrently.
class Program {
 public:
  // Throws std::invalid_argument, naming the instruction, for any access out of bounds and any read
  // of elements that were not written.
  explicit Program(ProgramText text);

  const ProgramText& text() const { return text_; }

  // Of the caller's arrays, in the order of their indices.
  std::vector<Reach> shared, gradients;
  std::vector<Gap> gaps;
  std::vector<std::int64_t> sequences, fixed, states;  // widths
  std::vector<bool> written;                           // of the sequences
  std::vector<bool> previous;                          // of the sequences: has firsts

  // Of each phase, the values it uses, each once.
  std::vector<int> used[kPhases];
  // Of each table, its outputs as pieces.
  std::vector<std::vector<Piece>> pieces;
  bool before_first = false, after_last = false;  // some value has previous −1, +1

 private:
  ProgramText text_;
};

// A run of a program. Every array is the caller's; nothing written may overlap anything read.
struct ProgramCall {
  const Program* program = nullptr;
  std::int64_t T = 0, B = 0;
  bool reverse = false;
  int threads = 1;  // at most this many
  const void* const* shared = nullptr;
  const Sequence* sequences = nullptr;           // (T, B, width), units contiguous
  const State* firsts = nullptr;                 // (B, width), units contiguous; absent: zeros
  const State* fixed = nullptr;                  // (B, width), units contiguous
  const State* inits = nullptr;                  // (B, width), units contiguous; absent: zeros
  void* const* finals = nullptr;                 // (B, width), contiguous; null: not wanted
  void* const* gradients = nullptr;              // contiguous
  const std::int64_t* gradient_sizes = nullptr;  // elements
  void* workspace = nullptr;                     // program_workspace_size() bytes, 64-byte aligned
};

// Reads the program, sizes and threads. Throws std::bad_alloc where no machine has as much memory.
std::size_t program_workspace_size(const ProgramCall& call);
void run_program(const ProgramCall& call);

// How many threads a call uses where the cores are free, and whether they divide the columns of a
// step or the rows.
struct ProgramTeam {
  int threads = 1;
  bool columns = false;
};
ProgramTeam program_team(const ProgramCall& call);

}  // namespace fastrnn
