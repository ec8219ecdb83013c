// int8 weights: quantised with one scale per row (quantize.h), and packed into one array of bytes.
//
// Packed   uint8 (128 + bytes of the engine's order,): a header that says what is packed and for
//          which kernels, then what Backend::pack wrote. An array of another header is refused, so
//          that a file from another machine cannot give wrong results.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "argument.h"
#include "options.h"
#include "problem.h"

namespace fastrnn::bind {

struct Int8Header {
  char kind[96];  // the kernels and the options, as text
  std::int64_t input_size, hidden_size, biases, bytes;

  // Of packed weights for these options. TypeError, ValueError where the array is none.
  static Int8Header of(const Array& packed, const Options& options);
  // The packed weights after the header.
  static void* weights(const Array& packed) {
    return static_cast<char*>(packed.data()) + sizeof(Int8Header);
  }
};
static_assert(sizeof(Int8Header) == 128, "what follows is 64-byte aligned");

// The parameters of a problem with each matrix quantised. Biases stay where they are.
class Int8Parameters {
 public:
  explicit Int8Parameters(const Problem& p);
  const Parameters* data() const { return parameters_.data(); }

 private:
  std::vector<Parameters> parameters_;
  std::vector<std::vector<std::int8_t>> values_;
  std::vector<std::vector<float>> scales_;
};

// ValueError where a sum would have more products than 32 bits hold.
void expect_int8_columns(std::int64_t input_size, std::int64_t hidden_size, std::int64_t layers,
                         std::int64_t directions);

}  // namespace fastrnn::bind
