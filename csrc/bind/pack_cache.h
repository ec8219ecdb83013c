// `_C.PackCache`: a layer's weights in the order in which the kernels read them, kept from call to
// call for as long as the weights are the same.
//
// The same       every weight has the address, sizes, dtype and version counter that it had. The
// cache
//                holds a view of each, so that no other memory comes to lie at its address.
// Unseen writes  torch's counter does not see what is written through `.data`, a NumPy view or a
//                library that keeps it still on purpose (FSDP does). So biases are compared whole,
//                and of each matrix, of several heads each head's, a value in every row and in
//                every column.
// When           at the second call in a row with the same weights: a training loop, whose weights
//                change at every step, packs nothing twice. And only for calls of few pairs of step
//                and row; where there are many, packing anew costs next to nothing.
// Threads        under the GIL. A call keeps the packed weights it found, whatever comes after.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "argument.h"
#include "memory.h"
#include "problem.h"

namespace fastrnn::bind {

class PackCache {
 public:
  // The problem's parameters packed, or null: to be packed by the call itself. `objects` are the
  // tensors that `arrays` were read from, in the order of the flat list.
  std::shared_ptr<const Memory> find(const Problem& problem, const py::object* objects,
                                     const std::vector<Array>& arrays);
  void clear();
  bool packed() const { return packed_ != nullptr; }

 private:
  static constexpr std::int64_t kMostPairs = 4096;

  struct Entry {
    void* data;
    std::int64_t shape[3], strides[3];
    std::int64_t version;
    py::object view;  // keeps the memory
  };

  static bool matches(const Entry& entry, const Array& array, std::int64_t version);
  void keep(const Array& array);
  bool unchanged(const std::vector<Array>& arrays) const;

  std::vector<Entry> entries_;
  dlpack::DataType dtype_{};
  Options options_;
  std::vector<char> samples_;
  std::shared_ptr<const Memory> packed_;
};

void register_pack_cache(py::module_& module);

}  // namespace fastrnn::bind
