// What this build is and what it found: `_C.isa`, `isas`, `max_threads`, `openmp_file`,
// `cuda_info`, `cuda_kernels`; the limits of the machine: `fma_peak`, `read_bandwidth`; and the
// time that the engine expects of a call: `estimated_time`.
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "argument.h"
#include "call.h"
#include "cpu/isa.h"
#include "cpu/openmp.h"
#include "dtype.h"
#include "gil.h"
#include "options.h"
#include "register.h"

#ifdef FASTRNN_HAS_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

DType storage_named(const std::string& name) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    if (same(data_type(dtype), type_named(name))) return dtype;
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got " + name);
}

// A padded call of these sizes, without arrays.
Problem sized(const CheckedOptions& checked, const std::string& dtype, std::int64_t T,
              std::int64_t B, std::int64_t I, std::int64_t H) {
  Problem p;
  p.options = checked.options;
  p.dtype = storage_named(dtype);
  p.T = T, p.B = B, p.I = I, p.H = H;
  return p;
}

#ifdef FASTRNN_HAS_CUDA
py::object version(int number) {
  if (number == 0) return py::none();
  return py::str(std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10));
}

py::object cuda() {
  const CudaInfo info = cuda_info();
  py::list devices;
  for (const CudaDevice& device : info.devices) {
    py::dict entry;
    entry["name"] = device.name;
    entry["capability"] = py::make_tuple(device.major, device.minor);
    entry["multiprocessors"] = device.multiprocessors;
    entry["memory"] = device.memory;
    devices.append(entry);
  }
  py::dict result;
  result["build"] = version(info.build_version);
  result["runtime"] = version(info.runtime_version);
  result["driver"] = version(info.driver_version);
  result["devices"] = devices;
  result["error"] = info.error.empty() ? py::none() : py::object(py::str(info.error));
  result["cublaslt"] = info.cublaslt;
  return result;
}

py::object kernels(const CheckedOptions& checked, const std::string& dtype, std::int64_t T,
                   std::int64_t B, std::int64_t I, std::int64_t H, bool backward, bool allow_tf32,
                   const std::optional<int>& device) {
  Problem p = sized(checked, dtype, T, B, I, H);
  p.allow_tf32 = allow_tf32, p.persistent = true;
  const std::vector<Parameters> none(
      static_cast<std::size_t>(p.options.layers * p.options.directions));
  p.parameters = none.data();
  if (device) p.device = *device;
  const Pass pass = backward ? Pass::backward : Pass::forward;
  const CudaKernels found = device ? cuda_kernels(p, pass) : cuda_kernels_on_h200(p, pass);
  return py::make_tuple(found.persistent, found.why);
}
#else
py::object cuda() { return py::none(); }

py::object kernels(const CheckedOptions&, const std::string&, std::int64_t, std::int64_t,
                   std::int64_t, std::int64_t, bool, bool, const std::optional<int>&) {
  return py::none();
}
#endif

void check_measurement(int threads, double seconds) {
  if (threads < 1)
    throw py::value_error("threads: expected 1 or more, got " + std::to_string(threads));
  if (!(seconds > 0) || std::isinf(seconds))
    throw py::value_error("seconds: expected a number above 0, got " + std::to_string(seconds));
}

double estimate(const CheckedOptions& checked, const std::string& dtype, std::int64_t T,
                std::int64_t B, std::int64_t I, std::int64_t H, int threads) {
  Problem p = sized(checked, dtype, T, B, I, H);
  if (std::min({T, B, I, H}) < 1)
    throw py::value_error("T, B, input_size, hidden_size: expected 1 or more");
  p.threads = checked_threads(threads);
  return estimated_time(p) / 1e9;
}

double peak(const std::string& dtype, int threads, double seconds) {
  if (dtype != "float32" && dtype != "float64")
    throw py::value_error("dtype: expected 'float32' or 'float64', got '" + dtype + "'");
  check_measurement(threads, seconds);
  const WithoutGil unlocked;
  return fma_peak(dtype == "float32" ? DType::f32 : DType::f64, threads, seconds);
}

double bandwidth(std::int64_t bytes, int threads, double seconds) {
  constexpr std::int64_t fewest = 4096;  // a few blocks of the widest vectors
  if (bytes < fewest)
    throw py::value_error("bytes: expected " + std::to_string(fewest) + " or more, got " +
                          std::to_string(bytes));
  check_measurement(threads, seconds);
  const WithoutGil unlocked;
  return read_bandwidth(bytes, threads, seconds);
}

}  // namespace

void register_info(py::module_& module) {
  module.def("isa", cpu_isa);
  module.def("isas", cpu_isas);
  module.def("max_threads", openmp::max_threads);
  module.def("openmp_file", openmp_file);
  set_openmp_candidates(
      py::module_::import("fastrnn._openmp").attr("candidates")().cast<std::vector<std::string>>());
  module.def("cuda_info", cuda);
  module.def("cuda_kernels", kernels, py::arg("options"), py::arg("dtype"), py::arg("T"),
             py::arg("B"), py::arg("input_size"), py::arg("hidden_size"), py::arg("backward"),
             py::arg("allow_tf32"), py::arg("device").none(true));
  module.def("estimated_time", estimate, py::arg("options"), py::arg("dtype"), py::arg("T"),
             py::arg("B"), py::arg("input_size"), py::arg("hidden_size"), py::arg("threads"));
  module.def("fma_peak", peak, py::arg("dtype"), py::arg("threads"), py::arg("seconds"));
  module.def("read_bandwidth", bandwidth, py::arg("bytes"), py::arg("threads"), py::arg("seconds"));
}

}  // namespace fastrnn::bind
