// A stack of layers on the device: lays out the workspace, selects the persistent kernel, and runs
// layer by layer, in stream order.
//
// Workspace   [offset, length of packed data] [data between layers] [the library's scratch]
//             [a layer's scratch]. The layers use the last two in turn.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "backend.h"
#include "cells/list.h"
#include "layer.h"
#include "persistent.h"
#include "product.h"

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
    throw std::invalid_argument("cell: the CUDA engine does not support '" + o.cell +
                                "' with these options");
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

// Chooses a persistent kernel, or says why there is none.
using Planner = persistent::Plan (*)(const persistent::Sizes&);

class Stack {
 public:
  Stack(const Problem& p, Pass pass, Planner planner = persistent::plan_persistent)
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
    lay_out();
  }

  std::size_t workspace_size() const { return bytes_; }
  // The persistent kernel of every layer, or why they go step by step.
  const persistent::Plan& plan() const { return plan_; }

  void forward() {
    write_rows();
    Sequence previous = p_.input;
    for (Index l = 0; l < L_; ++l) {
      const Layer layer = describe_forward(l, previous);
      functions_.forward(layer);
      previous = layer.output;
    }
  }

  void backward() {
    write_rows();
    for (Index l = L_ - 1; l >= 0; --l) {
      Layer layer = describe_backward(l);
      layer.scratch = scratch_;
      functions_.backward(layer);
    }
  }

 private:
  persistent::Plan choose(Planner planner) const {
    persistent::Plan none;
    persistent::Sizes sizes;
    const char* why = "persistent kernels are not requested";
    if (p_.persistent) why = functions_.persistent_sizes(describe(0), pass_, &sizes);
    if (!why) return planner(sizes);
    none.why = why;
    return none;
  }

  // A packed table is in the workspace. When only the size is computed it has no address, so
  // batch_sizes indicates its presence.
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
    layer.saved_group = rows_.pairs * planes_ * padded(p_.H);
    layer.saved = shifted(p_.saved, g * layer.saved_group * compute_);
    layer.tools = tools_;
    layer.plan = plan_.kernel ? &plan_ : nullptr;
    return layer;
  }

  Layer describe_forward(Index l, const Sequence& input) const {
    Layer layer = describe(l);
    layer.scratch = scratch_;
    layer.input = input;
    if (!p_.all_layers && l + 1 < L_) layer.output = contiguous(between_[l % 2], D_ * O_);
    return layer;
  }

  Layer describe_backward(Index l) const {
    const Index g = l * D_;
    Layer layer = describe(l);
    // Their gradients are read some at a time, which the place of the gates must allow.
    layer.consume_saved = p_.consume_saved && reinterpret_cast<std::uintptr_t>(p_.saved) % 32 == 0;
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

  // A placeholder for memory, when only sizes are computed.
  static void* unknown() {
    static char present;
    return &present;
  }

  State state(State s, Index group) const {
    s.data = shifted(s.data, group * s.group * storage_);
    return s;
  }

  const Problem& p_;
  const Pass pass_;
  const Index planes_;
  const LayerFunctions& functions_;
  const Index L_, D_, O_, storage_, compute_;
  Rows rows_;
  Tools tools_;
  persistent::Plan plan_;
  Index *offset_ = nullptr, *length_ = nullptr;
  void* between_[2] = {};
  void* scratch_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace fastrnn::cuda
