#include "openmp.h"

#include <utility>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <atomic>
#include <cstring>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace fastrnn {
namespace {

std::vector<std::string>& candidates() {
  static std::vector<std::string>& files = *new std::vector<std::string>;
  return files;
}

}  // namespace

void set_openmp_candidates(std::vector<std::string> files) { candidates() = std::move(files); }

#if defined(__linux__)

namespace {

constexpr const char* kSystem = "libgomp.so.1";
constexpr const char* kBundled = "libfastrnn_openmp.so.1";
constexpr int kPauseSoft = 1;  // omp_pause_soft

// GNU's functions, which LLVM's and Intel's runtimes have too. None: no runtime.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*team_size)() = nullptr;
  int (*thread_number)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*pause_all)(int) = nullptr;  // OpenMP 5.0; null in older ones

  explicit operator bool() const { return parallel != nullptr; }
};

template <class Function>
bool look_up(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

// The runtime in a file, or in a library that this file depends on. It stays loaded.
Runtime open_runtime(const char* file, int flags = 0) {
  void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL | flags);
  if (library == nullptr) return {};
  Runtime r;
  if (look_up(library, "omp_get_num_threads", r.team_size) &&
      look_up(library, "omp_get_thread_num", r.thread_number) &&
      look_up(library, "omp_in_parallel", r.in_parallel) &&
      look_up(library, "omp_get_max_threads", r.max_threads) &&
      look_up(library, "GOMP_parallel", r.parallel)) {
    look_up(library, "omp_pause_resource_all", r.pause_all);
    return r;
  }
  dlclose(library);
  return {};
}

bool names_a_runtime(const char* path) {
  const char* slash = std::strrchr(path, '/');
  const char* name = slash ? slash + 1 : path;
  for (const char* known : {"libgomp", "libomp", "libiomp5"}) {
    const std::size_t length = std::strlen(known);
    if (std::strncmp(name, known, length) == 0 && (name[length] == '.' || name[length] == '-'))
      return true;
  }
  return false;
}

// The runtime that the process has loaded: of several, that of the earliest candidate.
Runtime find_loaded() {
  for (const std::string& file : candidates())
    if (const Runtime r = open_runtime(file.c_str(), RTLD_NOLOAD)) return r;
  std::vector<std::string> loaded;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* list) {
        if (info->dlpi_name && names_a_runtime(info->dlpi_name))
          static_cast<std::vector<std::string>*>(list)->emplace_back(info->dlpi_name);
        return 0;
      },
      &loaded);
  for (const std::string& file : loaded)
    if (const Runtime r = open_runtime(file.c_str(), RTLD_NOLOAD)) return r;
  return {};
}

// The copy beside this library.
Runtime open_bundled() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&find_loaded), &self) == 0 || !self.dli_fname) return {};
  const std::string path = self.dli_fname;
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return {};
  return open_runtime((path.substr(0, slash + 1) + kBundled).c_str());
}

Runtime choose() {
  if (const Runtime r = find_loaded()) return r;
  for (const std::string& file : candidates())
    if (const Runtime r = open_runtime(file.c_str())) return r;
  if (const Runtime r = open_runtime(kSystem)) return r;
  return open_bundled();
}

std::atomic<bool> chosen{false};

const Runtime& runtime() {
  static const Runtime found = choose();
  chosen.store(true, std::memory_order_release);
  return found;
}

}  // namespace

std::string openmp_file() {
  Dl_info info;
  if (!runtime() || dladdr(reinterpret_cast<void*>(runtime().parallel), &info) == 0) return {};
  return info.dli_fname ? info.dli_fname : "";
}

namespace openmp {

void parallel(int threads, void (*body)(void*), void* argument) {
  if (const Runtime& r = runtime())
    r.parallel(body, argument, static_cast<unsigned>(threads), 0);
  else
    body(argument);
}
int team_size() { return runtime() ? runtime().team_size() : 1; }
int thread_number() { return runtime() ? runtime().thread_number() : 0; }
bool in_parallel() { return runtime() && runtime().in_parallel() != 0; }
int max_threads() { return runtime() ? runtime().max_threads() : 1; }

bool release_pool() {
  const Runtime r = chosen.load(std::memory_order_acquire) ? runtime() : find_loaded();
  return !r || (r.pause_all != nullptr && r.pause_all(kPauseSoft) == 0);
}

}  // namespace openmp

#elif defined(_OPENMP)

std::string openmp_file() { return "linked"; }

namespace openmp {

void parallel(int threads, void (*body)(void*), void* argument) {
#pragma omp parallel num_threads(threads)
  body(argument);
}
int team_size() { return omp_get_num_threads(); }
int thread_number() { return omp_get_thread_num(); }
bool in_parallel() { return omp_in_parallel() != 0; }
int max_threads() { return omp_get_max_threads(); }
bool release_pool() { return omp_pause_resource_all(omp_pause_soft) == 0; }

}  // namespace openmp

#else

std::string openmp_file() { return {}; }

namespace openmp {

void parallel(int, void (*body)(void*), void* argument) { body(argument); }
int team_size() { return 1; }
int thread_number() { return 0; }
bool in_parallel() { return false; }
int max_threads() { return 1; }
bool release_pool() { return true; }

}  // namespace openmp

#endif

}  // namespace fastrnn
