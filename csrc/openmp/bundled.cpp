// libfastrnn_openmp.so.1: a need of the OpenMP runtime, and nothing else. auditwheel sees the need
// and puts a copy of the runtime into the wheel; csrc/cpu/openmp.h says when that copy is loaded.
#include <omp.h>

extern "C" __attribute__((visibility("default"))) int fastrnn_openmp_max_threads() {
  return omp_get_max_threads();
}
