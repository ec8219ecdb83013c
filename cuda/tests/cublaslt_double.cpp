// A test double of cuBLASLt: the same functions, implemented with plain loops according to its
// documentation, D = alpha·op(A)·op(B) + beta·C on column-major matrices. Invalid calls are errors:
// shapes that do not match, leading dimensions that are too small, attributes of the wrong size,
// memory with less alignment than declared.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "storage.h"

namespace {

using fastrnn::Bf16;
using fastrnn::F16;

enum Status { kSuccess = 0, kInvalid = 7, kUnsupported = 15 };

struct Description {
  int compute, scale;
  std::int32_t transposed[2] = {0, 0};
};
struct Layout {
  int type;
  std::uint64_t rows, columns;
  std::int64_t leading;
  std::int32_t batches = 1;
  std::int64_t batch = 0;
};
struct Preference {
  std::uint64_t scratch = 0;
  std::uint32_t reductions = 7;
  std::uint32_t alignment[4] = {256, 256, 256, 256};
};
struct Algorithm {
  std::uint64_t data[8];  // the declared alignments of A, B and D, and a mark
};
struct Found {
  Algorithm algorithm;
  std::size_t scratch;
  int state;
  float waves;
  int reserved[4];
};
constexpr std::uint64_t kMark = 0x66617374726e6eULL;

struct Sizes {
  std::uint64_t m, n, k;
};

bool fits(const Description& d, const Layout& a, const Layout& b, const Layout& c, Sizes& s) {
  s.m = d.transposed[0] ? a.columns : a.rows;
  s.k = d.transposed[0] ? a.rows : a.columns;
  s.n = d.transposed[1] ? b.rows : b.columns;
  const std::uint64_t depth = d.transposed[1] ? b.columns : b.rows;
  const auto leads = [](const Layout& l) { return l.leading >= static_cast<std::int64_t>(l.rows); };
  return depth == s.k && a.batches == c.batches && b.batches == c.batches && c.rows == s.m &&
         c.columns == s.n && leads(a) && leads(b) && leads(c) && a.type == b.type;
}

template <class S>
double at(const Layout& l, const void* data, bool transposed, std::uint64_t i, std::uint64_t j) {
  if (transposed) {
    const std::uint64_t other = i;
    i = j, j = other;
  }
  return fastrnn::widen(static_cast<const S*>(
      data)[static_cast<std::int64_t>(j) * l.leading + static_cast<std::int64_t>(i)]);
}

double value(const Layout& l, const void* data, bool transposed, std::uint64_t i, std::uint64_t j) {
  switch (l.type) {
    case 1:
      return at<double>(l, data, transposed, i, j);
    case 2:
      return at<F16>(l, data, transposed, i, j);
    case 14:
      return at<Bf16>(l, data, transposed, i, j);
    default:
      return at<float>(l, data, transposed, i, j);
  }
}

template <class C>
void multiply(const Description& d, const Sizes& s, const Layout& a, const void* a_data,
              const Layout& b, const void* b_data, const Layout& c, const void* c_data, void* to,
              C alpha, C beta) {
  for (std::uint64_t j = 0; j < s.n; ++j)
    for (std::uint64_t i = 0; i < s.m; ++i) {
      double sum = 0;
      for (std::uint64_t k = 0; k < s.k; ++k)
        sum += value(a, a_data, d.transposed[0] != 0, i, k) *
               value(b, b_data, d.transposed[1] != 0, k, j);
      const std::int64_t n =
          static_cast<std::int64_t>(j) * c.leading + static_cast<std::int64_t>(i);
      // C must not be read if beta is zero.
      const C before = beta == C(0) ? C(0) : beta * static_cast<const C*>(c_data)[n];
      static_cast<C*>(to)[n] = alpha * static_cast<C>(sum) + before;
    }
}

// Matrix n of a batched layout.
void* moved(const Layout& l, const void* data, std::int64_t n) {
  const std::int64_t bytes = l.type == 1 ? 8 : l.type == 0 ? 4 : 2;
  return const_cast<char*>(static_cast<const char*>(data)) + n * l.batch * bytes;
}

bool aligned(const void* data, std::uint64_t alignment) {
  return alignment > 0 && reinterpret_cast<std::uintptr_t>(data) % alignment == 0;
}

}  // namespace

#define PUBLIC extern "C" __attribute__((visibility("default")))

PUBLIC int cublasLtCreate(void** handle) {
  static int one;
  *handle = &one;
  return kSuccess;
}
PUBLIC int cublasLtMatmulDescCreate(void** description, int compute, int scale) {
  const bool known = (compute == 68 && scale == 0) || (compute == 77 && scale == 0) ||
                     (compute == 70 && scale == 1);
  if (!known) return kInvalid;
  *description = new Description{compute, scale};
  return kSuccess;
}
PUBLIC int cublasLtMatmulDescDestroy(void* description) {
  delete static_cast<Description*>(description);
  return kSuccess;
}
PUBLIC int cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* from,
                                          std::size_t size) {
  if ((attribute != 3 && attribute != 4) || size != sizeof(std::int32_t)) return kInvalid;
  std::memcpy(&static_cast<Description*>(description)->transposed[attribute - 3], from, size);
  return kSuccess;
}
PUBLIC int cublasLtMatrixLayoutCreate(void** layout, int type, std::uint64_t rows,
                                      std::uint64_t columns, std::int64_t leading) {
  *layout = new Layout{type, rows, columns, leading};
  return kSuccess;
}
PUBLIC int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* from,
                                            std::size_t size) {
  auto* l = static_cast<Layout*>(layout);
  void* to = attribute == 5   ? static_cast<void*>(&l->batches)
             : attribute == 6 ? &l->batch
                              : nullptr;
  if (!to || size != (attribute == 5 ? sizeof(l->batches) : sizeof(l->batch))) return kInvalid;
  std::memcpy(to, from, size);
  return kSuccess;
}
PUBLIC int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kSuccess;
}
PUBLIC int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new Preference;
  return kSuccess;
}
PUBLIC int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return kSuccess;
}
PUBLIC int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* from,
                                                std::size_t size) {
  auto* p = static_cast<Preference*>(preference);
  void* to = attribute == 1                     ? static_cast<void*>(&p->scratch)
             : attribute == 3                   ? &p->reductions
             : attribute >= 5 && attribute <= 8 ? &p->alignment[attribute - 5]
                                                : nullptr;
  if (!to || size != (attribute == 1 ? sizeof(std::uint64_t) : sizeof(std::uint32_t)))
    return kInvalid;
  std::memcpy(to, from, size);
  return kSuccess;
}
PUBLIC int cublasLtMatmulAlgoGetHeuristic(void*, void* description, void* a, void* b, void* c,
                                          void* d, void* preference, int wanted, Found* found,
                                          int* count) {
  Sizes sizes{};
  *count = 0;
  const auto* p = static_cast<const Preference*>(preference);
  if (wanted < 1 || c != d ||
      !fits(*static_cast<Description*>(description), *static_cast<Layout*>(a),
            *static_cast<Layout*>(b), *static_cast<Layout*>(c), sizes))
    return kInvalid;
  if (p->reductions & 1) return kUnsupported;  // in-place reductions have no fixed order
  *found = Found{};
  found->algorithm.data[0] = p->alignment[0];
  found->algorithm.data[1] = p->alignment[1];
  found->algorithm.data[2] = p->alignment[3];
  found->algorithm.data[3] = kMark;
  *count = 1;
  return kSuccess;
}
PUBLIC int cublasLtMatmul(void*, void* description, const void* alpha, const void* a,
                          void* a_layout, const void* b, void* b_layout, const void* beta,
                          const void* c, void* c_layout, void* d, void* d_layout,
                          const Algorithm* algorithm, void*, std::size_t, void*) {
  const auto& what = *static_cast<Description*>(description);
  const auto &left = *static_cast<Layout*>(a_layout), &right = *static_cast<Layout*>(b_layout);
  const auto& result = *static_cast<Layout*>(d_layout);
  Sizes sizes{};
  if (c != d || c_layout != d_layout || !fits(what, left, right, result, sizes) ||
      algorithm->data[3] != kMark || !aligned(a, algorithm->data[0]) ||
      !aligned(b, algorithm->data[1]) || !aligned(d, algorithm->data[2]))
    return kInvalid;
  for (std::int32_t n = 0; n < result.batches; ++n) {
    const void *one = moved(left, a, n), *other = moved(right, b, n);
    void* to = moved(result, d, n);
    if (!aligned(one, algorithm->data[0]) || !aligned(other, algorithm->data[1]) ||
        !aligned(to, algorithm->data[2]))
      return kInvalid;
    if (what.scale == 1)
      multiply<double>(what, sizes, left, one, right, other, result, to, to,
                       *static_cast<const double*>(alpha), *static_cast<const double*>(beta));
    else
      multiply<float>(what, sizes, left, one, right, other, result, to, to,
                      *static_cast<const float*>(alpha), *static_cast<const float*>(beta));
  }
  return kSuccess;
}
