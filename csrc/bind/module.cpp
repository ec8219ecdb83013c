// The Python module `fastrnn._C`: one line for each part that registers itself.
#include <pybind11/pybind11.h>

#include "call.h"
#include "frozen.h"
#include "infer.h"
#include "info.h"
#include "options.h"
#include "stream.h"
#include "tensor.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The engine, low level: arrays in and out, nothing allocated, everything checked.";
  fastrnn::bind::register_tensor(module);
  fastrnn::bind::register_options(module);
  fastrnn::bind::register_frozen(module);
  fastrnn::bind::register_call(module);
  fastrnn::bind::register_infer(module);
  fastrnn::bind::register_stream(module);
  fastrnn::bind::register_info(module);
}
