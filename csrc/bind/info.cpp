#include "info.h"

#include <pybind11/stl.h>

#include <string>

#include "call.h"
#include "cpu/isa.h"

#ifdef FASTRNN_HAS_CUDA
#include "cuda_info.h"
#endif

namespace py = pybind11;

namespace fastrnn::bind {
namespace {

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
  return result;
}
#else
py::object cuda() { return py::none(); }
#endif

}  // namespace

void register_info(py::module_& module) {
  module.def("isa", cpu_isa);
  module.def("isas", cpu_isas);
  module.def("max_threads", max_threads);
  module.def("cuda_info", cuda);
}

}  // namespace fastrnn::bind
