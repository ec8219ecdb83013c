// Matrix products by cuBLASLt, found at run time: nothing is linked, and where it is not found the
// engine multiplies by a kernel of its own (matrix.h).
//
// Looked for, the first that is there: the file that FASTRNN_CUBLASLT names ("none": no library);
// the copy that the process has loaded, which is torch's; a wheel of NVIDIA's beside this package;
// the system's.
//
// Repeatable: one algorithm is asked for at a time, the first of the library's own ordering for the
// shape and alignment, and none that adds partial sums in an order left to chance.
#pragma once

#include <cstddef>

#include "kernel.h"
#include "problem.h"

namespace fastrnn::cuda {

struct Library;  // the functions of cuBLASLt

// Null where there is none. The answer is sought once.
const Library* find_library();
// The file it came from, or why there is none.
const char* library_origin();

// Scratch that the library may ask for, for each call of the engine.
#if !defined(FASTRNN_LIBRARY_SCRATCH)  // the tests' library takes none, and they fill it each time
#define FASTRNN_LIBRARY_SCRATCH (std::size_t{32} << 20)
#endif
inline constexpr std::size_t kLibraryScratch = FASTRNN_LIBRARY_SCRATCH;

// What multiplies on behalf of one call.
struct Tools {
  void* stream = nullptr;
  int device = 0;
  const Library* library = nullptr;
  void* scratch = nullptr;  // kLibraryScratch bytes
  bool allow_tf32 = false;
};

// to[m][n] (+)= Σ_k a(m, k)·b(n, k): a and b in `dtype`, `to` in its compute type; `batches` of
// them, the matrices so many elements apart.
struct AnyMatrices {
  DType dtype;
  Index m, n, k;
  const void* a;
  Index a_m, a_k;  // strides in elements
  const void* b;
  Index b_n, b_k;
  void* to;
  Index to_m;
  bool add;
  Index batches, a_batch, b_batch, to_batch;
};

// One shape of product, prepared to be multiplied often. Lives on the host.
class LibraryProduct {
 public:
  // Not usable() where there is no library, or where it does not take the strides.
  LibraryProduct(const Tools& tools, const AnyMatrices& p);
  ~LibraryProduct();
  LibraryProduct(const LibraryProduct&) = delete;
  LibraryProduct& operator=(const LibraryProduct&) = delete;

  bool usable() const { return usable_; }
  // The same sizes and strides, at other places that lie whole rows away from the first. Throws
  // std::runtime_error where the library fails.
  void run(const void* a, const void* b, void* to) const;

 private:
  bool describe(const AnyMatrices& p);
  bool repeat(void* layout, Index batches, Index stride) const;
  bool choose(const AnyMatrices& p);

  const Tools tools_;
  bool usable_ = false;
  bool add_ = false;
  bool doubles_ = false;
  void *description_ = nullptr, *left_ = nullptr, *right_ = nullptr, *result_ = nullptr;
  std::uint64_t algorithm_[8] = {};
};

}  // namespace fastrnn::cuda
