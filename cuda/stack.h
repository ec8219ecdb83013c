// A stack of layers on the device: lays out the workspace and runs layer by layer, in the order of
// the stream; or the layers side by side. Asks by which persistent kernel it may go.
//
// Side by side  where a step leaves most of the device idle (pieces_of_time): time is cut into
//             pieces, and while a layer runs a piece, on a stream of its own (side_streams.h), the
//             layer above runs the piece before. The launches are those of layer after layer, in
//             their order within each layer, so the results are the same. A layer above waits for
//             the piece below by an event; no kernel waits for another. Only with one direction,
//             as the second one starts at the end of time; and only by a launch for each step, as
//             persistent kernels on several streams could wait for each other's blocks. Backward
//             from the last layer and the last step; the gradients of weights come when a layer's
//             steps are done, in the order in which they do otherwise.
// Workspace   [offset, length of packed data] [what goes from layer to layer] [the library's]
//             [a layer's scratch]. The last two are used by each layer in turn, or side by side
//             there is one for each.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "backend.h"
#include "cells/list.h"
#include "layer.h"
#include "persistent.h"
#include "product.h"
#include "side_streams.h"

namespace fastrnn::cuda {

template <class... Cells>
int cell_index(CellList<Cells...>, const Options& o) {
  int index = -1, found = -1;
  const auto try_cell = [&](const char* name, bool accepts) {
    ++index;
    if (found < 0 && o.cell == name && accepts) found = index;
  };
  (try_cell(Cells::name, Cells::accepts(o.maths) && (Cells::projects || o.proj_size == 0)), ...);
  if (found < 0)
    throw std::invalid_argument("cell: '" + o.cell + "' is not a cell of this engine on CUDA");
  return found;
}

inline const LayerFunctions& functions_of_type(DType dtype, int cell) {
  switch (dtype) {
    case DType::f64:
      return functions_f64(cell);
    case DType::bf16:
      return functions_bf16(cell);
    case DType::f16:
      return functions_f16(cell);
    case DType::f32:
      break;
  }
  return functions_f32(cell);
}

// In how many pieces of time layers run side by side; 1: layer after layer. Of n pieces each layer
// starts a piece after the one below, so all of them take (n + layers − 1) pieces' time; with a
// piece's steps at 4 µs each and some 24 µs for its projection and events, the best n is
// √((layers − 1)·T/6). Below four pieces there is little to gain, and so where a layer's step has
// blocks for more than half of the multiprocessors. Estimates.
inline Index pieces_of_time(Index T, Index layers, Index blocks, Index multiprocessors) {
#if defined(FASTRNN_STEPS_OF_A_PIECE)  // the tests want many small pieces
  const Index fewest = 1, pieces = ceil_div(T, FASTRNN_STEPS_OF_A_PIECE);
#else
  const Index fewest = 4;
  const auto pieces = static_cast<Index>(std::sqrt(static_cast<double>((layers - 1) * T) / 6));
#endif
  return layers > 1 && pieces >= fewest && 2 * blocks <= multiprocessors ? pieces : 1;
}

// Chooses a persistent kernel, or says why there is none.
using Planner = resident::Plan (*)(const resident::Sizes&);

class Stack {
 public:
  Stack(const Problem& p, Pass pass, Planner planner = resident::plan_persistent)
      : p_(p),
        pass_(pass),
        planes_(cell_traits(p.options).saved_planes),
        functions_(functions_of_type(p.dtype, cell_index(AllCells{}, p.options))),
        L_(p.options.layers),
        D_(p.options.directions),
        O_(p.options.proj_size ? p.options.proj_size : p.H),
        storage_(p.dtype == DType::f64   ? 8
                 : p.dtype == DType::f32 ? 4
                                         : 2),
        compute_(p.dtype == DType::f64 ? 8 : 4) {
    rows_.T = p.T, rows_.B = p.B;
    rows_.pairs = p.T * p.B;
    if (p.batch_sizes) {
      rows_.pairs = 0;
      for (Index t = 0; t < p.T; ++t) rows_.pairs += p.batch_sizes[t];
    }
    rows_.lengths = p.lengths;
    rows_.reset = p.reset, rows_.reset_step = p.reset_step, rows_.reset_row = p.reset_row;
    tools_.stream = p.stream, tools_.device = p.device, tools_.allow_tf32 = p.allow_tf32;
    tools_.library = find_library();
    plan_ = choose(planner);
    pieces_ = choose_pieces();
    lay_out();
  }

  std::size_t workspace_size() const { return bytes_; }
  // The persistent kernel of every layer, or why they go step by step.
  const resident::Plan& plan() const { return plan_; }

  // In how many pieces of time the layers run side by side; 1: layer after layer.
  Index pieces() const { return pieces_; }

  void forward() {
    write_rows();
    if (pieces_ > 1) return forward_side_by_side();
    Sequence previous = p_.input;
    for (Index l = 0; l < L_; ++l) {
      const Layer layer = describe_forward(l, previous);
      functions_.forward(layer);
      previous = layer.output;
    }
  }

  void backward() {
    write_rows();
    if (pieces_ > 1) return backward_side_by_side();
    for (Index l = L_ - 1; l >= 0; --l) {
      Layer layer = describe_backward(l);
      layer.scratch = scratch_;
      functions_.backward(layer);
    }
  }

 private:
  void forward_side_by_side() {
    SideStreams side(p_.stream, static_cast<int>(L_));
    std::vector<std::unique_ptr<Pieces>> layers;
    Sequence previous = p_.input;
    for (Index l = 0; l < L_; ++l) {
      Layer layer = describe_forward(l, previous);
      layer.tools.stream = side.stream(static_cast<int>(l));
      layers.push_back(functions_.forward_pieces(layer));
      previous = layer.output;
    }
    run_side_by_side(side, layers);
  }

  void backward_side_by_side() {
    SideStreams side(p_.stream, static_cast<int>(L_));
    std::vector<std::unique_ptr<Pieces>> layers;
    for (Index l = L_ - 1; l >= 0; --l) {
      Layer layer = describe_backward(l);
      take_own(layer, l);
      layer.tools.stream = side.stream(static_cast<int>(L_ - 1 - l));
      layers.push_back(functions_.backward_pieces(layer));
    }
    run_side_by_side(side, layers);
  }

  // Layers in the order of the pass. The one at place j runs piece k in round j + k, and finishes
  // in the round after its last. In a round from the last place to the first: a layer waits for
  // what the one before it was given in earlier rounds, its piece k and no more.
  void run_side_by_side(SideStreams& side, const std::vector<std::unique_ptr<Pieces>>& layers) {
    const Index steps = piece_steps(), count = ceil_div(p_.T, steps);
    for (Index round = 0; round < count + L_; ++round)
      for (Index j = std::min(L_ - 1, round); j >= 0 && round - j <= count; --j) {
        Pieces& layer = *layers[static_cast<std::size_t>(j)];
        if (round - j == count) {
          layer.finish();
          continue;
        }
        if (j > 0) side.wait(static_cast<int>(j), static_cast<int>(j - 1));
        layer.run_to(std::min(p_.T, (round - j + 1) * steps));
      }
    side.join();
  }

  // Memory that layers take side by side rather than in turn, at most.
  static constexpr std::size_t kMostSideBytes = std::size_t{1} << 30;

  Index choose_pieces() const {
    if (L_ == 1 || D_ > 1 || plan_.kernel) return 1;
    const int rows = p_.dtype == DType::f64 ? kTileRows<double> : kTileRows<float>;
    const Index blocks = ceil_div(p_.B, rows) * ceil_div(p_.H, kWarps);
    const Index pieces = pieces_of_time(p_.T, L_, blocks, multiprocessors());
    std::size_t bytes = 0;
    for (Index l = 0; pieces > 1 && l < L_; ++l) bytes += scratch_of(l, ceil_div(p_.T, pieces));
    return bytes <= kMostSideBytes ? pieces : 1;
  }
  Index piece_steps() const { return ceil_div(p_.T, pieces_); }

  resident::Plan choose(Planner planner) const {
    resident::Plan none;
    resident::Sizes sizes;
    const char* why = "persistent kernels are not asked for";
    if (p_.persistent) why = functions_.persistent_sizes(describe(0), pass_, &sizes);
    if (!why) return planner(sizes);
    none.why = why;
    return none;
  }

  // A packed table lies in the workspace: whoever only measures gives it no address, so that its
  // presence is said by batch_sizes.
  void write_rows() {
    if (!p_.batch_sizes) return;
    rows_.offset = offset_, rows_.packed_length = length_;
    write_packed_table(p_.stream, p_.batch_sizes, p_.T, offset_, length_);
  }

  void lay_out() {
    Arena arena(p_.workspace);
    if (p_.batch_sizes) {
      offset_ = arena.take<Index>(p_.T);
      length_ = arena.take<Index>(p_.B);
    }
    const bool backward = pass_ == Pass::backward;
    if (backward || !p_.all_layers)
      for (Index i = 0; i < std::min<Index>(L_ - 1, 2); ++i)
        between_[i] = arena.take<char>(rows_.pairs * D_ * O_ * (backward ? compute_ : storage_));
    if (pieces_ > 1) return lay_out_side_by_side(arena);
    if (tools_.library) tools_.scratch = arena.take<char>(kLibraryScratch);
    std::size_t most = 0;
    for (const Index l : {Index{0}, std::min<Index>(L_ - 1, 1), L_ - 1}) {
      const Layer layer = backward ? describe_backward(l) : describe(l);
      most = std::max(
          most, backward ? functions_.backward_scratch(layer) : functions_.forward_scratch(layer));
    }
    scratch_ = arena.take<char>(static_cast<Index>(most));
    bytes_ = arena.used();
  }

  void lay_out_side_by_side(Arena& arena) {
    for (Index l = 0; l < L_; ++l) {
      Own own;
      if (tools_.library) own.library = arena.take<char>(kLibraryScratch);
      own.layer = arena.take<char>(static_cast<Index>(scratch_of(l, piece_steps())));
      own_.push_back(own);
    }
    bytes_ = arena.used();
  }

  std::size_t scratch_of(Index l, Index steps) const {
    const bool backward = pass_ == Pass::backward;
    Layer layer = backward ? describe_backward(l) : describe(l);
    layer.piece_steps = steps;
    return backward ? functions_.backward_scratch(layer) : functions_.forward_scratch(layer);
  }

  void take_own(Layer& layer, Index l) const {
    const Own& own = own_[static_cast<std::size_t>(l)];
    layer.scratch = own.layer, layer.tools.scratch = own.library;
    layer.piece_steps = piece_steps();
  }

  static void* shifted(const void* p, Index bytes) {
    return p ? const_cast<char*>(static_cast<const char*>(p)) + bytes : nullptr;
  }
  Sequence contiguous(void* data, Index width) const { return {data, p_.B * width, width, 1}; }

  Layer describe(Index l) const {
    const Index g = l * D_, width = D_ * O_, one = rows_.pairs * width * storage_;
    Layer layer;
    layer.maths = p_.options.maths;
    layer.rows = rows_;
    layer.batch_sizes = p_.batch_sizes;
    layer.directions = D_, layer.I = l ? width : p_.I, layer.H = p_.H, layer.O = O_;
    layer.P = p_.options.proj_size;
    layer.input = l ? contiguous(shifted(p_.hidden, (l - 1) * one), width) : p_.input;
    layer.h0 = state(p_.h0, g), layer.c0 = state(p_.c0, g);
    layer.parameters = p_.parameters + g;
    layer.output = contiguous(shifted(p_.hidden, p_.all_layers ? l * one : 0), width);
    layer.cell = contiguous(shifted(p_.cell, l * rows_.pairs * D_ * p_.H * compute_), D_ * p_.H);
    layer.h_n = shifted(p_.h_n, g * p_.B * O_ * storage_);
    layer.c_n = shifted(p_.c_n, g * p_.B * p_.H * storage_);
    layer.gates_group = rows_.pairs * planes_ * padded(p_.H);
    layer.gates = shifted(p_.gates, g * layer.gates_group * compute_);
    layer.tools = tools_;
    layer.plan = plan_.kernel ? &plan_ : nullptr;
    return layer;
  }

  Layer describe_forward(Index l, const Sequence& input) const {
    Layer layer = describe(l);
    layer.scratch = scratch_;
    layer.input = input;
    if (!p_.all_layers && l + 1 < L_) layer.output = contiguous(between_[l % 2], D_ * O_);
    if (pieces_ > 1) take_own(layer, l);
    return layer;
  }

  Layer describe_backward(Index l) const {
    const Index g = l * D_;
    Layer layer = describe(l);
    // Their gradients are read some at a time, which the place of the gates must allow.
    layer.consume_gates = p_.consume_gates && reinterpret_cast<std::uintptr_t>(p_.gates) % 32 == 0;
    if (l == L_ - 1)
      layer.d_output = p_.d_output;
    else
      layer.d_above = between_[l % 2] ? between_[l % 2] : unknown();
    layer.d_hidden = p_.d_hidden;
    layer.d_hidden.data = shifted(p_.d_hidden.data, l * p_.d_hidden_layer * storage_);
    layer.d_cell = p_.d_cell;
    layer.d_cell.data = shifted(p_.d_cell.data, l * p_.d_cell_layer * compute_);
    layer.d_h_n = state(p_.d_h_n, g), layer.d_c_n = state(p_.d_c_n, g);
    if (l > 0)
      layer.d_below = between_[(l - 1) % 2] ? between_[(l - 1) % 2] : unknown();
    else
      layer.d_input = p_.d_input;
    layer.d_h0 = shifted(p_.d_h0, g * p_.B * O_ * storage_);
    layer.d_c0 = shifted(p_.d_c0, g * p_.B * p_.H * storage_);
    layer.d_parameters = p_.d_parameters ? p_.d_parameters + g : nullptr;
    return layer;
  }

  // Stands for memory that will be given, where sizes alone are asked for.
  static void* unknown() {
    static char present;
    return &present;
  }

  State state(State s, Index group) const {
    s.data = shifted(s.data, group * s.group * storage_);
    return s;
  }

  // What each layer has of the workspace where they run side by side.
  struct Own {
    void *library = nullptr, *layer = nullptr;
  };

  const Problem& p_;
  const Pass pass_;
  const Index planes_;
  const LayerFunctions& functions_;
  const Index L_, D_, O_, storage_, compute_;
  Rows rows_;
  Tools tools_;
  resident::Plan plan_;
  Index pieces_ = 1;
  std::vector<Own> own_;
  Index *offset_ = nullptr, *length_ = nullptr;
  void* between_[2] = {};
  void* scratch_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fastrnn::cuda
