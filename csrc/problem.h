// One call of the engine: a whole stack of recurrent layers, forward or backward.
//
// Sizes       T steps, B rows (batch), I input size, H hidden size, P projection size (0: none),
//             L layers, D directions, O = P ? P : H (output units of a layer and direction),
//             G gates of the cell, N = number of (step, row) pairs that hold data: T·B when padded,
//             the sum of the lengths when packed.
// Storage     the dtype of input, weights, states and outputs: f32, f64, bf16, f16.
// Compute     float for f32, bf16 and f16; double for f64. Saved values are kept in it.
// Padded size Hp = padded(H): H rounded up to kUnitPadding. Saved values use it, so that vector
//             stores are whole on every instruction set.
//
// Ownership   every pointer belongs to the caller and stays valid for the whole call. Nothing the
//             engine writes may overlap anything it reads. No pointer is kept after the call.
// Absent      a null data pointer means "not given"; each field says what that stands for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fastrnn {

enum class DType : std::uint8_t { f32, f64, bf16, f16 };

// The candidate and cell-output function.
enum class Activation : std::uint8_t { tanh, relu, sigmoid, identity };
// The function of the multiplicative gates.
enum class GateActivation : std::uint8_t { sigmoid, hardsigmoid };

inline constexpr std::int64_t kUnitPadding = 16;
inline constexpr std::int64_t padded(std::int64_t units) {
  return (units + kUnitPadding - 1) / kUnitPadding * kUnitPadding;
}

// The most products of int8 in a sum of 32 bits: 2^17 · 127² < 2^31.
inline constexpr std::int64_t kMostInt8Products = std::int64_t{1} << 17;

// What changes the maths of one step (csrc/cells/).
struct CellOptions {
  Activation activation = Activation::tanh;
  GateActivation gate_activation = GateActivation::sigmoid;
  bool reset_after = true;  // GRU: reset gate after (true) or before (false) the matrix product
  std::int64_t heads = 1;   // blocks on the diagonal of W_hh, each of H/heads units: on a GPU
};

// Everything about a stack that is not a size of the data.
struct Options {
  std::string cell;  // "RNN", "LSTM", "GRU"; the names of csrc/cells/list.h
  CellOptions maths;
  std::int64_t layers = 1;
  std::int64_t directions = 1;  // 1 or 2; direction 1 runs backwards in time
  std::int64_t proj_size = 0;
  bool recompute = false;  // forward saves no gates: backward computes them again
  // Products are int8 (csrc/cpu/int8.h), all other arrays f32, on a CPU. Forward alone, without
  // `saved`, of `Problem::packed`; each sum has at most kMostInt8Products.
  bool int8 = false;
};

// A sequence array. Padded: element (t, b, u) is at data[t·step + b·row + u·unit].
// Packed: element (n, u) is at data[n·row + u·unit] and `step` is ignored. Strides in elements,
// any value (zero for an expanded gradient).
struct Sequence {
  void* data = nullptr;
  std::int64_t step = 0, row = 0, unit = 1;
};

// A state array, element (l·D + d, b, u) at data[(l·D + d)·group + b·row + u·unit].
struct State {
  void* data = nullptr;
  std::int64_t group = 0, row = 0, unit = 1;
};

// A weight matrix, element (m, k) at data[m·row + k·unit], of several heads element (head, m, k) at
// data[head·head + m·row + k·unit]; or a vector, element m at data[m·unit].
struct Weight {
  void* data = nullptr;
  std::int64_t row = 0, unit = 1;
  std::int64_t head = 0;
  float* scale = nullptr;  // of an int8 matrix, where weights are packed: element m; contiguous
};

// The parameters of one layer and direction.
struct Parameters {
  Weight weight_ih;  // [G·H, I of the layer]
  Weight weight_hh;  // [G·H, O]; of several heads [heads, G·H/heads, O/heads], gates in each head
  Weight bias_ih;    // [G·H], absent: zero
  Weight bias_hh;    // [G·H], absent: zero
  Weight weight_hr;  // [P, H], absent without projection
};

struct Problem {
  Options options;
  DType dtype = DType::f32;
  std::int64_t T = 0, B = 0, I = 0, H = 0;
  int threads = 1;  // at most this many threads work on the call

  // ---- on a GPU -----------------------------------------------------------------------------
  // All arrays are in the memory of `device`, except batch_sizes, which the host reads. The call
  // enqueues its work on `stream` and does not wait for it.
  int device = 0;
  void* stream = nullptr;   // a cudaStream_t
  bool allow_tf32 = false;  // float32 products may round their factors to TF32
  // A whole sequence may run in one launch where there is a kernel for it (cuda/persistent.h).
  bool persistent = false;

  // ---- which rows are active at each step (csrc/steps.h) ------------------------------------
  // At most one of the first two is given; neither: every row is active at every step.
  const std::int64_t* batch_sizes = nullptr;  // [T], not increasing: PackedSequence, data is packed
  // [B], 0…T, any order: data is padded. On a GPU other values are clamped to this range.
  const std::int64_t* lengths = nullptr;
  const bool* reset = nullptr;  // reset[t·reset_step + b·reset_row]; padded data only.
  std::int64_t reset_step = 0, reset_row = 0;  // True: reset_h, reset_c replace the state before

  // ---- forward: read ------------------------------------------------------------------------
  Sequence input;          // [T, B, I] or packed [N, I]
  State h0, c0;            // [L·D, B, O], [L·D, B, H]; absent: zeros
  bool wide_c0 = false;    // forward: c0 is of compute type, as `cell` is
  State reset_h, reset_c;  // forward: [L·D, O], [L·D, H], `row` ignored; absent: zeros
  const Parameters* parameters = nullptr;  // [L·D]
  // Forward: the parameters as packed by Backend::pack; `parameters` are then not read and may be
  // null. Null: this call packs them itself.
  const void* packed = nullptr;

  // ---- forward: written; backward: read. All contiguous -------------------------------------
  bool all_layers = false;  // hidden holds every layer, else the last alone
  void* hidden = nullptr;   // [L or 1, T, B, D·O] or [L or 1, N, D·O], storage; padding is zero
  // Forward on a CPU: a copy of the last layer of `hidden`, [T, B, D·O] or [N, D·O], which the
  // caller may overwrite before backward reads `hidden`. Null: not wanted.
  void* output = nullptr;
  void* h_n = nullptr;  // [L·D, B, O], storage
  void* c_n = nullptr;  // [L·D, B, H], storage; null for cells of one state
  // Every c, compute type: [L, T, B, D·H] or [L, N, D·H]; padding is zero. Null: not wanted.
  void* cell = nullptr;
  // What backward needs beside `hidden` and `cell`, compute type: [L·D, T·B or N, planes·Hp], in
  // the engine's own row order. Null: inference. When given, `all_layers` must be true and, for
  // cells with a c, `cell` given. planes: saved_planes() in backend.h. With Options::recompute it
  // is never given.
  void* saved = nullptr;

  // Backward: `saved` is not needed afterwards; the gradients of the gates may overwrite it.
  bool consume_saved = false;
  // Backward on a CPU: `saved` holds the gradients of the gates, as a call with consume_saved left
  // them; d_parameters alone are computed.
  bool parameters_alone = false;

  // ---- backward: read. Absent: zeros --------------------------------------------------------
  Sequence d_output;          // [T, B, D·O] or [N, D·O]: gradient of the last layer's output
  Sequence d_hidden, d_cell;  // gradients of every layer's h and c, storage and compute type, as
  std::int64_t d_hidden_layer = 0, d_cell_layer = 0;  // Sequence plus the stride between layers
  State d_h_n, d_c_n;

  // ---- backward: written, contiguous, storage. Null: not wanted -----------------------------
  void* d_input = nullptr;             // [T, B, I] or [N, I]; padding is zero
  void* d_h0 = nullptr;                // [L·D, B, O]
  void* d_c0 = nullptr;                // [L·D, B, H]
  Parameters* d_parameters = nullptr;  // [L·D], each contiguous, absent where not wanted

  // ---- scratch ------------------------------------------------------------------------------
  // workspace_size() bytes, contents undefined; 64-byte aligned, on CUDA 256-byte aligned.
  void* workspace = nullptr;
};

}  // namespace fastrnn
