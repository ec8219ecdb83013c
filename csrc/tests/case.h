// One case of the tests in C++: a stack, its sizes, which rows run, and what a call is given; and
// the workspace of a call. Shared by the tests of the engine (this folder) and of the CUDA kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "backend.h"

namespace fastrnn::cases {

inline long checks = 0;

inline std::size_t size_of(std::int64_t n) { return static_cast<std::size_t>(n); }

struct Case {
  Options options;
  std::int64_t T = 1, B = 1, I = 1, H = 1;
  int threads = 1;
  std::vector<std::int64_t> lengths, batch_sizes;  // empty: not given
  std::vector<unsigned char> reset;
  bool training = true, every_layer = true, consume = false;
  bool biases = true, states = true;         // given
  bool turned = false, batch_first = false;  // strides
  bool persistent = false, tf32 = false;     // requested and allowed
  bool d_output = true, d_states = true, d_finals = true, d_input = true, d_weights = true;

  std::int64_t D() const { return options.directions; }
  std::int64_t L() const { return options.layers; }
  std::int64_t P() const { return options.proj_size; }
  std::int64_t O() const { return P() ? P() : H; }
  std::int64_t heads() const { return options.maths.heads; }
  std::int64_t G() const { return cell_traits(options).gates; }
  std::int64_t groups() const { return L() * D(); }
  std::int64_t inputs(std::int64_t group) const { return group < D() ? I : D() * O(); }
  std::int64_t kept_layers() const { return every_layer || training ? L() : 1; }
  bool has_c() const { return cell_traits(options).states > 1; }
  bool packed() const { return !batch_sizes.empty(); }

  // (step, row) pairs; those of row b; and the place of one of them.
  std::int64_t pairs() const {
    if (!packed()) return T * B;
    return std::accumulate(batch_sizes.begin(), batch_sizes.end(), std::int64_t{0});
  }
  std::int64_t length_of(std::int64_t b) const {
    if (!lengths.empty()) return lengths[size_of(b)];
    if (!packed()) return T;
    return std::count_if(batch_sizes.begin(), batch_sizes.end(),
                         [b](std::int64_t rows) { return rows > b; });
  }
  std::int64_t place_of(std::int64_t t, std::int64_t b) const {
    if (!packed()) return t * B + b;
    return std::accumulate(batch_sizes.begin(), batch_sizes.begin() + t, b);
  }

  std::string text() const {
    const auto number = [](const char* name, std::int64_t value) {
      return std::string(" ") + name + std::to_string(value);
    };
    const auto where = [](const char* name, bool is_so) { return is_so ? name : ""; };
    const CellOptions& maths = options.maths;
    return options.cell + number("L", L()) + number("D", D()) + number("P", P()) + number("T", T) +
           number("B", B) + number("I", I) + number("H", H) + number("heads ", heads()) +
           where(" packed", packed()) + where(" lengths", !lengths.empty()) +
           where(" reset", !reset.empty()) + number("act ", static_cast<int>(maths.activation)) +
           number("gate ", static_cast<int>(maths.gate_activation)) +
           where(" reset-before", !maths.reset_after) + where(" inference", !training) +
           where(" consume", consume) + where(" turned", turned) +
           where(" batch-first", batch_first) + where(" no-bias", !biases) +
           where(" no-hx", !states) + where(" persistent", persistent);
  }
};

// The workspace starts as NaN, so that a read before the first write shows; the bytes after it must
// not change.
struct Workspace {
  std::vector<unsigned char> memory;
  std::size_t bytes = 0;
  unsigned char* at = nullptr;

  void* take(std::size_t size) {
    bytes = size;
    memory = std::vector<unsigned char>(size + 128, 0xff);  // fresh: not as the last call left it
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    at = reinterpret_cast<unsigned char*>((address + 63) / 64 * 64);
    return at;
  }
  bool is_whole() const {
    const unsigned char* end = memory.data() + memory.size();
    return std::all_of<const unsigned char*>(at + bytes, end,
                                             [](unsigned char x) { return x == 0xff; });
  }
};

}  // namespace fastrnn::cases
