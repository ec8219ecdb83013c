// The prototypes, constants and layouts below are those of cuBLASLt's public interface
// (https://docs.nvidia.com/cuda/cublas/, versions 12 and 13). They are repeated here so that the
// build needs neither its headers nor its library.
#include "library.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fastrnn::cuda {
namespace {

constexpr int kSuccess = 0;
constexpr std::int32_t kPlain = 0, kTransposed = 1;                      // cublasOperation_t
constexpr int kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBfloat16 = 14;  // cudaDataType_t
constexpr int kCompute32 = 68, kCompute64 = 70, kComputeTf32 = 77;       // cublasComputeType_t
constexpr int kTransposeA = 3, kTransposeB = 4;   // cublasLtMatmulDescAttributes_t
constexpr int kBatches = 5, kBatchStride = 6;     // cublasLtMatrixLayoutAttribute_t
constexpr int kMostScratch = 1, kReductions = 3;  // cublasLtMatmulPreference…
constexpr int kAlignmentA = 5, kAlignmentB = 6, kAlignmentC = 7, kAlignmentD = 8;
constexpr std::uint32_t kReductionsInScratch = 2 | 4;  // in compute type, in output type; not in
                                                       // place (1)

struct Algorithm {
  std::uint64_t data[8];
};
struct Found {
  Algorithm algorithm;
  std::size_t scratch;
  int state;
  float waves;
  int reserved[4];
};

}  // namespace

struct Library {
  int (*create)(void** handle);
  int (*description_create)(void** description, int compute_type, int scale_type);
  int (*description_destroy)(void* description);
  int (*description_set)(void* description, int attribute, const void* value, std::size_t size);
  int (*layout_create)(void** layout, int type, std::uint64_t rows, std::uint64_t columns,
                       std::int64_t leading);
  int (*layout_destroy)(void* layout);
  int (*layout_set)(void* layout, int attribute, const void* value, std::size_t size);
  int (*preference_create)(void** preference);
  int (*preference_destroy)(void* preference);
  int (*preference_set)(void* preference, int attribute, const void* value, std::size_t size);
  int (*heuristic)(void* handle, void* description, void* a, void* b, void* c, void* d,
                   void* preference, int wanted, Found* found, int* count);
  int (*matmul)(void* handle, void* description, const void* alpha, const void* a, void* a_layout,
                const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                void* d, void* d_layout, const Algorithm* algorithm, void* scratch,
                std::size_t scratch_size, void* stream);
  static constexpr int kDevices = 64;
  void* handle[kDevices] = {};  // one for each device
  std::string origin;
};

namespace {

template <class Function>
bool find(void* file, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(file, name));
  return function != nullptr;
}

bool find_functions(void* file, Library& l) {
  return find(file, "cublasLtCreate", l.create) &&
         find(file, "cublasLtMatmulDescCreate", l.description_create) &&
         find(file, "cublasLtMatmulDescDestroy", l.description_destroy) &&
         find(file, "cublasLtMatmulDescSetAttribute", l.description_set) &&
         find(file, "cublasLtMatrixLayoutCreate", l.layout_create) &&
         find(file, "cublasLtMatrixLayoutDestroy", l.layout_destroy) &&
         find(file, "cublasLtMatrixLayoutSetAttribute", l.layout_set) &&
         find(file, "cublasLtMatmulPreferenceCreate", l.preference_create) &&
         find(file, "cublasLtMatmulPreferenceDestroy", l.preference_destroy) &&
         find(file, "cublasLtMatmulPreferenceSetAttribute", l.preference_set) &&
         find(file, "cublasLtMatmulAlgoGetHeuristic", l.heuristic) &&
         find(file, "cublasLtMatmul", l.matmul);
}

// The site-packages folder in which this module is installed: …/site-packages/fastrnn/_C.so.
std::string packages() {
  Dl_info here{};
  if (dladdr(reinterpret_cast<const void*>(&find_library), &here) == 0 || !here.dli_fname)
    return "";
  std::string path = here.dli_fname;
  for (int up = 0; up < 2; ++up) {
    const std::size_t slash = path.rfind('/');
    if (slash == std::string::npos) return "";
    path.resize(slash);
  }
  return path;
}

void* open_any(std::string& origin) {
  const char* wanted = std::getenv("FASTRNN_CUBLASLT");
  if (wanted && *wanted) {
    origin = wanted;
    return origin == "none" ? nullptr : dlopen(wanted, RTLD_NOW | RTLD_LOCAL);
  }
  const std::string names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  for (const std::string& name : names)
    if (void* file = dlopen(name.c_str(), RTLD_NOW | RTLD_NOLOAD)) {
      origin = name + ", loaded by the process";
      return file;
    }
  const std::string root = packages();
  for (const std::string& path : {root + "/nvidia/cu13/lib/" + names[0],
                                  root + "/nvidia/cublas/lib/" + names[1], names[0], names[1]})
    if (void* file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      origin = path;
      return file;
    }
  origin = "cuBLASLt was not found";
  return nullptr;
}

struct Search {
  Library library;
  bool found = false;
  Search() {
    std::string& origin = library.origin;
    void* file = open_any(origin);
    if (!file) return;
    if (!find_functions(file, library))
      origin += ": not a cuBLASLt of version 12 or 13";
    else
      found = true;
  }
};

Search& search() {
  static Search once;
  return once;
}

// The library's handle for a device, which must be current; created with its first product.
void* handle_of(int device) {
  static std::mutex mutex;
  if (device < 0 || device >= Library::kDevices) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  Library& library = search().library;
  void*& handle = library.handle[device];
  if (!handle && library.create(&handle) != kSuccess) handle = nullptr;
  return handle;
}

int type_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return kFloat64;
    case DType::bf16:
      return kBfloat16;
    case DType::f16:
      return kFloat16;
    case DType::f32:
      break;
  }
  return kFloat32;
}

int compute_of(const Tools& tools, DType dtype) {
  if (dtype == DType::f64) return kCompute64;
  return dtype == DType::f32 && tools.allow_tf32 ? kComputeTf32 : kCompute32;
}

Index bytes_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The alignment of every row of matrices with `stride` bytes between rows and `batch` bytes between
// matrices.
std::uint32_t alignment(const void* data, Index stride, Index batch) {
  const std::uint64_t bits =
      reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uint64_t>(stride | batch) | 256;
  return static_cast<std::uint32_t>(bits & (~bits + 1));
}

// A matrix x(row, k) in the library's column-major layout: its transpose, if k is contiguous.
struct Operand {
  bool transposed;  // k is not contiguous
  std::uint64_t rows, columns;
  Index leading;
};

bool describe_operand(Index rows, Index k, Index stride_row, Index stride_k, Operand& o) {
  if (stride_k == 1 && (stride_row >= k || rows == 1)) {
    o = {false, static_cast<std::uint64_t>(k), static_cast<std::uint64_t>(rows),
         greatest(stride_row, k)};
    return true;
  }
  if (stride_row == 1 && (stride_k >= rows || k == 1)) {
    o = {true, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(k),
         greatest(stride_k, rows)};
    return true;
  }
  return false;
}

}  // namespace

const Library* find_library() {
  const Search& s = search();
  return s.found ? &s.library : nullptr;
}

const char* library_origin() { return search().library.origin.c_str(); }

// The library is column-major, so the row-major to[m][n] is its n × m result: its left operand is
// b, its right operand is a.
LibraryProduct::LibraryProduct(const Tools& tools, const AnyMatrices& p)
    : tools_(tools), add_(p.add), doubles_(p.dtype == DType::f64) {
  if (!tools.library || p.m <= 0 || p.n <= 0 || p.k <= 0 || !handle_of(tools.device)) return;
  usable_ = describe(p) && choose(p);
}

bool LibraryProduct::describe(const AnyMatrices& p) {
  const Library& l = *tools_.library;
  Operand left, right;
  if (!describe_operand(p.n, p.k, p.b_n, p.b_k, left) ||
      !describe_operand(p.m, p.k, p.a_m, p.a_k, right) || p.to_m < p.n)
    return false;
  const int type = type_of(p.dtype), wide = doubles_ ? kFloat64 : kFloat32;
  if (l.description_create(&description_, compute_of(tools_, p.dtype), wide) != kSuccess)
    return false;
  // Left: n × k. If k is contiguous it is stored as k × n, and therefore transposed.
  const std::int32_t turn_left = left.transposed ? kPlain : kTransposed;
  const std::int32_t turn_right = right.transposed ? kTransposed : kPlain;
  return l.description_set(description_, kTransposeA, &turn_left, sizeof(turn_left)) == kSuccess &&
         l.description_set(description_, kTransposeB, &turn_right, sizeof(turn_right)) ==
             kSuccess &&
         l.layout_create(&left_, type, left.rows, left.columns, left.leading) == kSuccess &&
         l.layout_create(&right_, type, right.rows, right.columns, right.leading) == kSuccess &&
         l.layout_create(&result_, wide, static_cast<std::uint64_t>(p.n),
                         static_cast<std::uint64_t>(p.m), p.to_m) == kSuccess &&
         (p.batches == 1 || repeat(left_, p.batches, p.b_batch)) &&
         (p.batches == 1 || repeat(right_, p.batches, p.a_batch)) &&
         (p.batches == 1 || repeat(result_, p.batches, p.to_batch));
}

// Sets the batch count and stride of a layout.
bool LibraryProduct::repeat(void* layout, Index batches, Index stride) const {
  const Library& l = *tools_.library;
  const auto count = static_cast<std::int32_t>(batches);
  return l.layout_set(layout, kBatches, &count, sizeof(count)) == kSuccess &&
         l.layout_set(layout, kBatchStride, &stride, sizeof(stride)) == kSuccess;
}

bool LibraryProduct::choose(const AnyMatrices& p) {
  const Library& l = *tools_.library;
  void* preference = nullptr;
  if (l.preference_create(&preference) != kSuccess) return false;
  const auto set = [&](int attribute, const auto& value) {
    return l.preference_set(preference, attribute, &value, sizeof(value)) == kSuccess;
  };
  const Index bytes = bytes_of(p.dtype), wide = doubles_ ? 8 : 4;
  const std::uint64_t scratch = tools_.scratch ? kLibraryScratch : 0;
  const std::uint32_t left =
      alignment(p.b, (p.b_k == 1 ? p.b_n : p.b_k) * bytes, p.b_batch * bytes);
  const std::uint32_t right =
      alignment(p.a, (p.a_k == 1 ? p.a_m : p.a_k) * bytes, p.a_batch * bytes);
  const std::uint32_t result = alignment(p.to, p.to_m * wide, p.to_batch * wide);
  Found found{};
  int count = 0;
  const bool chosen = set(kMostScratch, scratch) && set(kReductions, kReductionsInScratch) &&
                      set(kAlignmentA, left) && set(kAlignmentB, right) &&
                      set(kAlignmentC, result) && set(kAlignmentD, result) &&
                      l.heuristic(handle_of(tools_.device), description_, left_, right_, result_,
                                  result_, preference, 1, &found, &count) == kSuccess &&
                      count == 1 && found.state == kSuccess && found.scratch <= scratch;
  l.preference_destroy(preference);
  for (int i = 0; i < 8; ++i) algorithm_[i] = found.algorithm.data[i];
  return chosen;
}

LibraryProduct::~LibraryProduct() {
  if (!tools_.library) return;
  const Library& l = *tools_.library;
  if (result_) l.layout_destroy(result_);
  if (right_) l.layout_destroy(right_);
  if (left_) l.layout_destroy(left_);
  if (description_) l.description_destroy(description_);
}

void LibraryProduct::run(const void* a, const void* b, void* to) const {
  const Library& l = *tools_.library;
  const float one = 1, beta = add_ ? 1 : 0;
  const double wide_one = 1, wide_beta = beta;
  Algorithm algorithm;
  for (int i = 0; i < 8; ++i) algorithm.data[i] = algorithm_[i];
  const int status = l.matmul(
      handle_of(tools_.device), description_, doubles_ ? static_cast<const void*>(&wide_one) : &one,
      b, left_, a, right_, doubles_ ? static_cast<const void*>(&wide_beta) : &beta, to, result_, to,
      result_, &algorithm, tools_.scratch, tools_.scratch ? kLibraryScratch : 0, tools_.stream);
  if (status != kSuccess)
    throw std::runtime_error("cublasLtMatmul failed with status " + std::to_string(status));
}

}  // namespace fastrnn::cuda
