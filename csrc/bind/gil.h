// Releasing the GIL, in threads that may outlive the interpreter.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace fastrnn::bind {

inline bool interpreter_is_ending() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Whether this thread holds the GIL or can still acquire it.
inline bool python_is_there() {
  return Py_IsInitialized() && (!interpreter_is_ending() || PyGILState_Check());
}

// Releases the GIL for a scope.
//
// A daemon thread may still run when the interpreter ends. Python before 3.14 ends a thread that
// then acquires the GIL by pthread_exit, which unwinds the stack: through destructors, which may
// not throw (std::terminate), and through objects that must no longer be used. Such a thread waits
// here for the end of the process instead, as in Python 3.14.
class WithoutGil {
 public:
  WithoutGil() : ending_(interpreter_is_ending()), state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    if (!ending_ && interpreter_is_ending()) wait_for_the_end();
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // pthread_exit, where the end began meanwhile
      wait_for_the_end();
    }
  }

 private:
  [[noreturn]] static void wait_for_the_end() {
    for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
  }

  bool ending_;  // then this is the thread that ends the interpreter
  PyThreadState* state_;
};

}  // namespace fastrnn::bind
