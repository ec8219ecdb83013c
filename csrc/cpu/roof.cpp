// Runs the loops of roof.h on a team of threads, against the clock.
#include <chrono>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "isa.h"
#include "layer.h"
#include "threads.h"

namespace fastrnn {
namespace {

double now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(since).count();
}

// Each thread's own part of a measurement.
class Worker {
 public:
  virtual ~Worker() = default;
  virtual void prepare() {}
  // Some work, tens of microseconds or more of it, and how much that was.
  virtual double work() = 0;

 protected:
  volatile double kept_ = 0;
};

class Multiplier : public Worker {
 public:
  explicit Multiplier(const MultiplyAdd& loop) : loop_(loop) {}
  double work() override {
    constexpr std::int64_t rounds = 4096;
    kept_ = loop_.run(rounds);
    return static_cast<double>(rounds) * loop_.flops;
  }

 private:
  MultiplyAdd loop_;
};

class Reader : public Worker {
 public:
  Reader(const RoofLoops& loops, std::int64_t bytes)
      : loops_(loops),
        count_(bytes / kBlockBytes * kBlockBytes / static_cast<std::int64_t>(sizeof(float))),
        array_(static_cast<float*>(
            ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64}))) {}
  // By the thread that reads it, so that its pages are near that thread.
  void prepare() override {
    for (std::int64_t i = 0; i < count_; ++i) array_.get()[i] = 1.0f;
  }
  double work() override {
    constexpr std::int64_t enough = 1 << 20;  // floats
    const std::int64_t passes = count_ < enough ? enough / count_ : 1;
    kept_ = loops_.read(array_.get(), count_, passes);
    return static_cast<double>(passes * count_) * sizeof(float);
  }

 private:
  static constexpr std::int64_t kBlockBytes = 512;  // the widest set reads whole blocks of it
  struct Free {
    void operator()(float* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  const RoofLoops& loops_;
  std::int64_t count_;
  std::unique_ptr<float, Free> array_;
};

// What all the threads get done in a second. Each divides its own work by its own time, so that
// none waits for another at the end.
class Race {
 public:
  Race(std::vector<std::unique_ptr<Worker>> workers, double seconds)
      : workers_(std::move(workers)), rates_(workers_.size()), seconds_(seconds) {}

  double run() {
    run_threads(
        static_cast<int>(workers_.size()),
        [](void* race, int thread, int count) {
          static_cast<Race*>(race)->run_thread(static_cast<std::size_t>(thread), count);
        },
        this);
    double total = 0;
    for (const double rate : rates_) total += rate;
    return total;
  }

 private:
  void run_thread(std::size_t thread, int count) {
    Worker& worker = *workers_[thread];
    worker.prepare();
    start_.wait(count);
    work_for(worker, seconds_ / 5);
    rates_[thread] = work_for(worker, seconds_);
  }

  static double work_for(Worker& worker, double seconds) {
    const double start = now();
    double done = 0, elapsed = 0;
    do {
      done += worker.work();
      elapsed = now() - start;
    } while (elapsed < seconds);
    return done / elapsed;
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<double> rates_;
  double seconds_;
  Barrier start_;
};

template <class MakeWorker>
double billions_per_second(int threads, double seconds, MakeWorker make_worker) {
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(make_worker());
  return Race(std::move(workers), seconds).run() / 1e9;
}

}  // namespace

double fma_peak(DType dtype, int threads, double seconds) {
  const MultiplyAdd& loop = chosen_set().roof.multiply_add[dtype == DType::f64 ? 1 : 0];
  return billions_per_second(threads, seconds, [&] { return std::make_unique<Multiplier>(loop); });
}

double read_bandwidth(std::int64_t bytes, int threads, double seconds) {
  const RoofLoops& set = chosen_set().roof;
  return billions_per_second(threads, seconds,
                             [&] { return std::make_unique<Reader>(set, bytes); });
}

}  // namespace fastrnn
