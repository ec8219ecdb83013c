// Runs the loops of roof.h on a team of threads, against the clock.
#include <chrono>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "layer.h"
#include "threads.h"

namespace fastrnn {
namespace {

// What all the threads get done in a second. Each divides its own work by its own time, so that
// none waits for another at the end. prepare(thread) runs before the clock; work(thread) does some
// work, tens of microseconds or more of it, and returns how much that was.
template <class Prepare, class Work>
double billions_per_second(int threads, double seconds, Prepare prepare, Work work) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> rates(static_cast<std::size_t>(threads));
  Barrier start;
  run_threads(threads, [&](int thread, int count) {
    const auto rate_over = [&](double span) {
      const Clock::time_point begin = Clock::now();
      double done = 0, elapsed = 0;
      do {
        done += work(thread);
        elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
      } while (elapsed < span);
      return done / elapsed;
    };
    prepare(thread);
    start.wait(count);
    rate_over(seconds / 5);
    rates[static_cast<std::size_t>(thread)] = rate_over(seconds);
  });
  double total = 0;
  for (const double rate : rates) total += rate;
  return total / 1e9;
}

// Keeps the result of a loop, or a compiler may drop the loop.
void keep(double result) {
  volatile double kept = result;
  static_cast<void>(kept);
}

struct Free {
  void operator()(float* data) const { ::operator delete(data, std::align_val_t{64}); }
};

}  // namespace

double fma_peak(DType dtype, int threads, double seconds) {
  const MultiplyAdd& loop = chosen_set().roof.multiply_add[dtype == DType::f64 ? 1 : 0];
  return billions_per_second(
      threads, seconds, [](int) {},
      [&](int) {
        constexpr std::int64_t rounds = 4096;
        keep(loop.run(rounds));
        return static_cast<double>(rounds) * loop.flops;
      });
}

double read_bandwidth(std::int64_t bytes, int threads, double seconds) {
  constexpr std::int64_t kBlockBytes = 512;  // the widest set reads whole blocks of it
  const std::int64_t count = bytes / kBlockBytes * kBlockBytes / 4;
  std::vector<std::unique_ptr<float, Free>> arrays;
  for (int i = 0; i < threads; ++i)
    arrays.emplace_back(
        static_cast<float*>(::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})));
  const auto array = [&](int thread) { return arrays[static_cast<std::size_t>(thread)].get(); };
  return billions_per_second(
      threads, seconds,
      // By the thread that reads it, so that its pages are near that thread.
      [&](int thread) {
        for (std::int64_t i = 0; i < count; ++i) array(thread)[i] = 1.0f;
      },
      [&](int thread) {
        constexpr std::int64_t enough = 1 << 20;  // floats
        const std::int64_t passes = count < enough ? enough / count : 1;
        keep(chosen_set().roof.read(array(thread), count, passes));
        return static_cast<double>(passes * count) * sizeof(float);
      });
}

}  // namespace fastrnn
