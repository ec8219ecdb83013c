// Threads of one call: an OpenMP region, and a barrier that yields where cores are oversubscribed.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <type_traits>

namespace fastrnn {

// A barrier of `count` threads. A waiting thread spins (where every thread has a core, a step's
// barrier takes a microsecond), then yields, then sleeps. With fewer free cores than threads the
// team is as fast as its slowest thread, and no waiting thread keeps a core that another needs.
class Barrier {
 public:
  // start: of a region, whose threads may have slept. step: of the recurrence. part: between parts
  // of the work, which threads may finish at different times: a long wait there is ignored.
  enum class Wait { start, step, part };
  // Returns whether an earlier start or step had a long wait here: the cores are oversubscribed.
  // All threads that wait together get the same answer.
  bool wait(int count, Wait kind = Wait::step);
  // Forgets long waits and solo phases. Call it while no thread waits.
  void forget();

  // A solo phase: one thread computes alone, the others rest until it calls them.
  //
  // The other threads: rests through solo phase number `solo_phase` (from 0). Returns the place at
  // which to resume.
  std::int64_t rest(std::uint32_t solo_phase);
  // The thread that computes: whether all `others` are ready to resume. Wakes them once the cores
  // are no longer oversubscribed; a thread that answers has a core.
  bool all_ready(int others);
  // The thread that computes: ends the solo phase. All resume at `place`, ready or not.
  void resume(std::int64_t place);

 private:
  std::atomic<bool> late_{false};  // some thread has waited long
  bool oversubscribed_ = false;    // the answer, written by the last to arrive
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  // Of a solo phase, under the mutex.
  bool asked_ = false;             // the others are to say that they are ready
  int ready_ = 0;                  // how many have
  std::uint32_t solo_phases_ = 0;  // ended so far
  std::int64_t place_ = 0;
};

// Runs body(argument, thread, count) on `threads` threads; on one where there cannot be as many:
// inside another parallel region, or without OpenMP. Works in forked children too.
void run_threads(int threads, void (*body)(void*, int thread, int count), void* argument);
// The same with a function object.
template <class Body>
void run_threads(int threads, Body&& body) {
  run_threads(
      threads,
      [](void* b, int thread, int count) {
        (*static_cast<std::remove_reference_t<Body>*>(b))(thread, count);
      },
      &body);
}

// Whether the cores are oversubscribed: a team had a long wait a moment ago (the more often that
// happens, the longer it counts). A barrier at every step then costs more than a team gains.
bool cores_are_oversubscribed();

}  // namespace fastrnn
