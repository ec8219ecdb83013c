#include "threads.h"

#include <algorithm>
#include <chrono>
#include <fstream>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>

#include "openmp.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrnn {
namespace {

using Clock = std::chrono::steady_clock;

#if defined(FASTRNN_IMPATIENT)  // in a test: every wait is long, and soon forgotten
constexpr int kSpins = 0;
constexpr std::chrono::microseconds kLate{0}, kLateStart{0};
constexpr Clock::duration kLeastSpan = std::chrono::microseconds{20}, kMostSpan = kLeastSpan;
#else
constexpr int kSpins = 2000;  // about 40 µs
// Longer waits are late. At the start of a region threads may first have to be woken.
constexpr std::chrono::microseconds kLate{500}, kLateStart{3000};
constexpr Clock::duration kLeastSpan = std::chrono::milliseconds{2};
constexpr Clock::duration kMostSpan = std::chrono::milliseconds{1000};
#endif
constexpr int kYields = 64;
// A late wait within this many spans of the last one doubles the span.
constexpr int kAgain = 8;

std::atomic<Clock::rep> oversubscribed_until{0}, last_span{0};

// After a late wait the cores count as oversubscribed for a span; after another one soon, for twice
// that span.
void note_late_wait(Clock::time_point now) {
  const Clock::rep at = now.time_since_epoch().count(), last = last_span.load();
  const bool again = at < oversubscribed_until.load() + kAgain * last;
  const Clock::rep span =
      std::max(again ? std::min(2 * last, kMostSpan.count()) : 0, kLeastSpan.count());
  last_span.store(span);
  oversubscribed_until.store(at + span);
}

inline void pause_core() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

void open_region(int threads, void (*body)(void*, int, int), void* argument) {
  struct Region {
    int threads;
    void (*body)(void*, int, int);
    void* argument;
  } region{threads, body, argument};
  openmp::parallel(
      threads,
      [](void* given) {
        const Region& r = *static_cast<const Region*>(given);
        const int count = openmp::team_size(), thread = openmp::thread_number();
        if (count == r.threads)
          r.body(r.argument, thread, count);
        else if (thread == 0)
          r.body(r.argument, 0, 1);
      },
      &region);
}

#if defined(__unix__) || defined(__APPLE__)

// ---- forks --------------------------------------------------------------------------------------
//
// GNU's OpenMP gives each thread that opens regions its own pool of threads. In a forked child only
// the thread that forked exists, not its pool: its next region would wait for the pool for ever.
// Threads that the child starts begin without a pool and are not affected.
//
// So we release the pool before a fork, and the next region makes a new one, in parent and child.
// Where that is impossible (a fork inside a region) or did not happen (a process forked before this
// library was loaded), another thread, the deputy, opens the regions.

// Opens the regions of the one thread that lost its pool.
class Deputy {
 public:
  // False where no such thread can be started.
  bool run(int threads, void (*body)(void*, int, int), void* argument) {
    if (!started_) {
      try {
        std::thread(&Deputy::work, this).detach();
      } catch (const std::system_error&) {
        return false;
      }
      started_ = true;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    threads_ = threads;
    body_ = body;
    argument_ = argument;
    changed_.notify_all();
    changed_.wait(lock, [&] { return body_ == nullptr; });
    return true;
  }

 private:
  [[noreturn]] void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return body_ != nullptr; });
      lock.unlock();  // the caller waits until body_ is null
      open_region(threads_, body_, argument_);
      lock.lock();
      body_ = nullptr;
      changed_.notify_all();
    }
  }

  bool started_ = false;  // written by the one thread that calls run()
  std::mutex mutex_;
  std::condition_variable changed_;
  int threads_ = 0;
  void (*body_)(void*, int, int) = nullptr;  // not null: a region to open
  void* argument_ = nullptr;
};

Deputy* deputy = nullptr;  // never deleted: its thread waits until the process ends

// Whether this process was forked and has not executed another program since.
bool only_forked() {
#if defined(__linux__)
  constexpr unsigned long kForkedNotExecuted = 0x40;  // PF_FORKNOEXEC
  std::ifstream file("/proc/self/stat");
  std::string line;
  std::getline(file, line);
  const std::size_t name_end = line.rfind(')');  // a name may hold anything
  if (name_end == std::string::npos) return false;
  std::istringstream fields(line.substr(name_end + 1));
  std::string skipped;
  for (int i = 0; i < 6; ++i) fields >> skipped;  // state … tpgid
  unsigned long flags = 0;
  return fields >> flags && (flags & kForkedNotExecuted) != 0;
#else
  return false;
#endif
}

bool in_first_thread() {
#if defined(__linux__)
  return syscall(SYS_gettid) == getpid();
#else
  return true;
#endif
}

const bool forked_before_load = only_forked();
thread_local bool pool_is_lost = forked_before_load && in_first_thread();
thread_local bool pool_released = false;

struct ForkWatch {
  ForkWatch() {
    pthread_atfork([] { pool_released = !pool_is_lost && openmp::release_pool(); }, nullptr,
                   [] {
                     pool_is_lost = !pool_released;
                     deputy = nullptr;  // the parent's
                   });
  }
};
const ForkWatch fork_watch;

bool run_by_deputy(int threads, void (*body)(void*, int, int), void* argument) {
  if (deputy == nullptr) deputy = new Deputy;
  return deputy->run(threads, body, argument);
}

#else

constexpr bool pool_is_lost = false;
bool run_by_deputy(int, void (*)(void*, int, int), void*) { return false; }

#endif

}  // namespace

bool Barrier::wait(int count, Wait kind) {
  if (count <= 1) return false;
  const std::uint32_t generation = generation_.load();
  if (arrived_.fetch_add(1) + 1 == count) {
    arrived_.store(0);
    oversubscribed_ = late_.load();
    generation_.fetch_add(1);
    // A sleeper counts itself before it reads the generation a last time, and we read the number of
    // sleepers after we change the generation: one of the two sees the other.
    if (sleepers_.load() > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    return oversubscribed_;
  }
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != generation) return oversubscribed_;
    pause_core();
  }
  const Clock::time_point begin = Clock::now();
  bool met = false;
  for (int i = 0; i < kYields && !met; ++i) {
    met = generation_.load(std::memory_order_acquire) != generation;
    if (!met) std::this_thread::yield();
  }
  if (!met) {
    sleepers_.fetch_add(1);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != generation; });
    }
    sleepers_.fetch_sub(1);
  }
  const bool answer = oversubscribed_;
  const Clock::time_point end = Clock::now();
  if (kind != Wait::part && end - begin > (kind == Wait::start ? kLateStart : kLate)) {
    late_.store(true);
    note_late_wait(end);
  }
  return answer;
}

void Barrier::forget() {
  late_.store(false);
  solo_phases_ = 0;
}

std::int64_t Barrier::rest(std::uint32_t solo_phase) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto ended = [&] { return solo_phases_ > solo_phase; };
  wake_.wait(lock, [&] { return asked_ || ended(); });
  if (!ended()) {
    ++ready_;
    wake_.wait(lock, ended);
  }
  return place_;
}

bool Barrier::all_ready(int others) {
  if (cores_are_oversubscribed()) return false;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!asked_) {
    asked_ = true;
    wake_.notify_all();
  }
  return ready_ == others;
}

void Barrier::resume(std::int64_t place) {
  const std::lock_guard<std::mutex> lock(mutex_);
  late_.store(false);
  asked_ = false;
  ready_ = 0;
  ++solo_phases_;
  place_ = place;
  wake_.notify_all();
}

bool cores_are_oversubscribed() {
  const Clock::rep until = oversubscribed_until.load(std::memory_order_relaxed);
  return until != 0 && Clock::now().time_since_epoch().count() < until;
}

void run_threads(int threads, void (*body)(void*, int, int), void* argument) {
  if (threads > 1 && !openmp::in_parallel()) {
    if (!pool_is_lost) return open_region(threads, body, argument);
    if (run_by_deputy(threads, body, argument)) return;
  }
  body(argument, 0, 1);
}

}  // namespace fastrnn
