// The Python module `fastrnn._C`: one line for each part that registers itself. For the main
// interpreter alone: types and references to them are kept for the whole process.
#include <pybind11/pybind11.h>

#include "register.h"

namespace {

constexpr const char* kOnlyMain =
    "fastrnn cannot be imported in a subinterpreter: import it in the main interpreter, or use a "
    "process of its own (multiprocessing)";

bool in_main_interpreter() { return PyInterpreterState_Get() == PyInterpreterState_Main(); }

}  // namespace

PYBIND11_MODULE(_C_of_main, module) {
  if (!in_main_interpreter()) throw pybind11::import_error(kOnlyMain);
  module.doc() = "The engine, low level: arrays in and out, nothing allocated, everything checked.";
  fastrnn::bind::register_tensor(module);
  fastrnn::bind::register_options(module);
  fastrnn::bind::register_frozen(module);
  fastrnn::bind::register_int8(module);
  fastrnn::bind::register_calls(module);
  fastrnn::bind::register_torch(module);
  fastrnn::bind::register_stream(module);
  fastrnn::bind::register_stand_in(module);
  fastrnn::bind::register_program(module);
  fastrnn::bind::register_convert(module);
  fastrnn::bind::register_info(module);
}

// Refuses before pybind11's own entry, which hangs in a subinterpreter of Python before 3.12. Newer
// Pythons may call this in the main interpreter first, and then only the entry above.
PyMODINIT_FUNC PyInit__C() {
  if (in_main_interpreter()) return PyInit__C_of_main();
  PyErr_SetString(PyExc_ImportError, kOnlyMain);
  return nullptr;
}
