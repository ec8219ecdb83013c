// What the programs of the ladder print and write: rows of a table, and the same as JSON.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

namespace ladder {

// Ends the program where a call failed, naming it.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// Exit code where there is no device: not a failure of the program.
inline constexpr int kNoDevice = 77;

inline bool has_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::printf("no CUDA device on this machine: nothing measured\n");
  return false;
}

class Report {
 public:
  void add(const std::string& what, double value, const std::string& unit) {
    rows_.push_back({what, unit, value, ""});
    std::printf("%-64s %12.4g %s\n", what.c_str(), value, unit.c_str());
    std::fflush(stdout);
  }
  void note(const std::string& what, const std::string& text) {
    rows_.push_back({what, "", 0, text});
    std::printf("%-64s %s\n", what.c_str(), text.c_str());
    std::fflush(stdout);
  }
  // A list of {"what", "value", "unit"} or {"what", "text"}.
  void write(const char* path) const {
    std::FILE* const file = std::fopen(path, "w");
    if (!file) {
      std::fprintf(stderr, "%s: cannot be written\n", path);
      std::exit(1);
    }
    std::fprintf(file, "[\n");
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const Row& r = rows_[i];
      if (!r.text.empty())
        std::fprintf(file, "  {\"what\": \"%s\", \"text\": \"%s\"}", r.what.c_str(),
                     r.text.c_str());
      else if (std::isfinite(r.value))
        std::fprintf(file, "  {\"what\": \"%s\", \"value\": %.9g, \"unit\": \"%s\"}",
                     r.what.c_str(), r.value, r.unit.c_str());
      else
        std::fprintf(file, "  {\"what\": \"%s\", \"text\": \"not a number\"}", r.what.c_str());
      std::fprintf(file, "%s\n", i + 1 < rows_.size() ? "," : "");
    }
    std::fprintf(file, "]\n");
    std::fclose(file);
  }

 private:
  struct Row {
    std::string what, unit;
    double value;
    std::string text;
  };
  std::vector<Row> rows_;
};

// The median of a few timed runs, in milliseconds; one untimed run first.
template <class Run>
double median_ms(Run run, int runs = 5) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  run();
  for (int i = 0; i < runs; ++i) {
    check(cudaEventRecord(start), "cudaEventRecord");
    run();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a timed run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end), "cudaEventElapsedTime");
    times.push_back(ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  for (std::size_t i = 1; i < times.size(); ++i)
    for (std::size_t j = i; j > 0 && times[j] < times[j - 1]; --j)
      std::swap(times[j], times[j - 1]);
  return times[times.size() / 2];
}

}  // namespace ladder
