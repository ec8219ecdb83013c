// The binary interface of DLPack 1.x, written from its public specification
// (https://dmlc.github.io/dlpack/latest/): only what fastrnn reads or makes, in names of our own.
// The layout of these structs is the standard's and must stay as it is.
#pragma once

#include <cstdint>

namespace fastrnn::dlpack {

inline constexpr std::uint32_t kMajor = 1;  // of the layout: must be equal on both sides
inline constexpr std::uint32_t kMinor = 1;

struct Version {
  std::uint32_t major, minor;
};

enum DeviceType : std::int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };

struct Device {
  std::int32_t type;
  std::int32_t id;
};

enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

// Strides count elements; null strides mean contiguous (C order).
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};

// What a capsule named "dltensor" holds.
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};

// What a capsule named "dltensor_versioned" holds.
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  std::uint64_t flags;
  Tensor tensor;
};

inline constexpr std::uint64_t kReadOnly = 1u << 0;
inline constexpr std::uint64_t kIsCopied = 1u << 1;

// The table of C functions behind `type(array).__dlpack_c_exchange_api__`, a capsule named
// "dlpack_exchange_api". The functions return 0, or -1 with a Python error set.
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // the table of an older version, or null
};

struct ExchangeApi {
  ExchangeHeader header;
  int (*allocate)(Tensor* prototype, ManagedVersioned** out, void* error_context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*to_managed)(void* py_object, ManagedVersioned** out);  // owning; no synchronisation
  int (*from_managed)(ManagedVersioned* tensor, void** out_py_object);
  int (*to_tensor)(void* py_object, Tensor* out);  // borrowed from py_object; may be null
  int (*current_stream)(std::int32_t device_type, std::int32_t device_id, void** out_stream);
};

}  // namespace fastrnn::dlpack
