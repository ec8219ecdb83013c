// The element types that arrays may have on their way in and out, by name.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "dlpack.h"

namespace fastrnn::bind {

struct TypeInfo {
  const char* name;
  std::uint8_t code;  // DLPack's
  std::uint8_t bits;
  const char* format;  // of the buffer protocol; null where it has none
};

inline constexpr TypeInfo kTypes[] = {
    {"float32", dlpack::kFloat, 32, "f"},
    {"float64", dlpack::kFloat, 64, "d"},
    {"bfloat16", dlpack::kBfloat, 16, nullptr},
    {"float16", dlpack::kFloat, 16, "e"},
    {"int64", dlpack::kInt, 64, sizeof(long) == 8 ? "l" : "q"},
    {"bool", dlpack::kBool, 8, "?"},
    {"uint8", dlpack::kUInt, 8, "B"},
    {"int8", dlpack::kInt, 8, "b"},
    {"int16", dlpack::kInt, 16, "h"},
    {"uint16", dlpack::kUInt, 16, "H"},
    {"int32", dlpack::kInt, 32, "i"},
    {"uint32", dlpack::kUInt, 32, "I"},
    {"uint64", dlpack::kUInt, 64, sizeof(long) == 8 ? "L" : "Q"},
    {"complex64", dlpack::kComplex, 64, "Zf"},
    {"complex128", dlpack::kComplex, 128, "Zd"},
};

inline constexpr bool same(dlpack::DataType a, dlpack::DataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

// Null where fastrnn has no name for the type.
inline const TypeInfo* find_type(dlpack::DataType dtype) {
  for (const TypeInfo& type : kTypes)
    if (type.code == dtype.code && type.bits == dtype.bits && dtype.lanes == 1) return &type;
  return nullptr;
}

inline constexpr dlpack::DataType data_type(const TypeInfo& type) {
  return {type.code, type.bits, 1};
}

inline std::string type_name(dlpack::DataType dtype) {
  if (const TypeInfo* type = find_type(dtype)) return type->name;
  return "DLPack type (code " + std::to_string(dtype.code) + ", " + std::to_string(dtype.bits) +
         " bits, " + std::to_string(dtype.lanes) + " lanes)";
}

inline dlpack::DataType type_named(const std::string& name) {
  for (const TypeInfo& type : kTypes)
    if (name == type.name) return data_type(type);
  std::string known;
  for (const TypeInfo& type : kTypes) known += (known.empty() ? "" : ", ") + std::string(type.name);
  throw std::invalid_argument("dtype: expected one of " + known + ", got '" + name + "'");
}

inline std::string device_name(dlpack::Device device) {
  switch (device.type) {
    case dlpack::kCPU:
      return "cpu";
    case dlpack::kCUDA:
      return "cuda:" + std::to_string(device.id);
    default:
      return "DLPack device " + std::to_string(device.type) + ":" + std::to_string(device.id);
  }
}

inline bool on_host(dlpack::Device device) {
  return device.type == dlpack::kCPU || device.type == dlpack::kCUDAHost ||
         device.type == dlpack::kCUDAManaged;
}

}  // namespace fastrnn::bind
