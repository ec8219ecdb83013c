// Matrix products with cuBLASLt, which is found at run time: nothing is linked. Without it a kernel
// of the engine computes the products (matrix.h).
//
// The search order: the file that FASTRNN_CUBLASLT names ("none": no library); the copy that the
// process has loaded, which is torch's; an NVIDIA wheel in the same site-packages; the system's.
//
// Results are repeatable: the code requests one algorithm, the first of the library's ordering for
// the shape and alignment, and excludes algorithms that add partial sums in a varying order.
#pragma once

#include <cstddef>

#include "kernel.h"
#include "problem.h"

namespace fastrnn::cuda {

struct Library;  // the functions of cuBLASLt

// Null if there is none. The search runs once.
const Library* find_library();
// The file from which the library was loaded, or the reason why there is none.
const char* library_origin();

// The scratch that the library may use, for each call of the engine.
#if !defined(FASTRNN_LIBRARY_SCRATCH)  // smaller in tests, which fill it at each call
#define FASTRNN_LIBRARY_SCRATCH (std::size_t{32} << 20)
#endif
inline constexpr std::size_t kLibraryScratch = FASTRNN_LIBRARY_SCRATCH;

// The resources for the products of one call.
struct Tools {
  void* stream = nullptr;
  int device = 0;
  const Library* library = nullptr;
  void* scratch = nullptr;  // kLibraryScratch bytes
  bool allow_tf32 = false;
};

// to[m][n] (+)= Σ_k a(m, k)·b(n, k): a and b in `dtype`, `to` in its compute type; `batches`
// products, with the given strides between the matrices.
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

// A product of one shape, prepared for repeated use. A host object.
class LibraryProduct {
 public:
  // Not usable() if there is no library, or if it does not support the strides.
  LibraryProduct(const Tools& tools, const AnyMatrices& p);
  ~LibraryProduct();
  LibraryProduct(const LibraryProduct&) = delete;
  LibraryProduct& operator=(const LibraryProduct&) = delete;

  bool usable() const { return usable_; }
  // The same sizes and strides at other addresses, which are whole rows away from the first. Throws
  // std::runtime_error if the library fails.
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
