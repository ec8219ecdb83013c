// `_C.Frozen`: a layer's weights packed once, in the order in which the kernels read them, while
// the layer is frozen (fastrnn.freeze).
//
// Thaws    at the first call in which a weight has another address, size, stride, dtype or version
//          counter: the packed copy is dropped and the call reads the weights that it was given. A
//          view of each weight is held, so that no other array can get its address.
// Unseen   a write that torch's counter does not see (`.data`, a NumPy view). It is documented.
// Threads  under the GIL. A call keeps the packed weights that it found, even if thawed meanwhile.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "argument.h"
#include "memory.h"
#include "options.h"
#include "problem.h"

namespace fastrnn::bind {

class Frozen {
 public:
  // Packs `weights`, torch tensors in the order of the flat list; `input` (T, B, I) gives I and
  // dtype.
  Frozen(const CheckedOptions& options, py::handle input, const py::tuple& weights);
  // The problem's parameters packed; null where they have changed. `objects`: the tensors of
  // `arrays`.
  std::shared_ptr<const Memory> find(const Problem& problem, const py::object* objects,
                                     const std::vector<Array>& arrays);
  void thaw();
  bool packed() const { return packed_ != nullptr; }

 private:
  struct Entry {
    Array array;
    std::int64_t version;
    py::object view;  // keeps the memory
  };

  static bool matches(const Entry& entry, const Array& array, std::int64_t version);

  std::vector<Entry> entries_;
  dlpack::DataType dtype_{};
  Options options_;
  std::shared_ptr<const Memory> packed_;
};

}  // namespace fastrnn::bind
