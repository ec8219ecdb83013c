// Threads of one call: an OpenMP region, and a barrier that gives way.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace fastrnn {

// Waits for `count` threads. Spins a little (a step's barrier is over in a microsecond when every
// thread has a core), then yields, then sleeps: with fewer free cores than threads it degrades to
// the speed of the slowest, and never burns a core that another thread of the team needs.
class Barrier {
 public:
  // At the start of a region, whose threads may have slept; of a step; or between parts of the
  // work, which threads may well end at different times.
  enum class Wait { start, step, part };
  // Whether some start or step had a long wait here before this one: a thread of the team has no
  // core to itself. All threads of one meeting get the same answer.
  bool wait(int count, Wait kind = Wait::step);
  // While nobody waits: as if there had been no long wait and no recess.
  void forget();

  // A recess: one thread works on by itself, the others rest until it has them go on.
  //
  // The others, in their recess number `recess` here (from 0). Gives where they are to go on.
  std::int64_t rest(std::uint32_t recess);
  // The one that works: whether the others, so many, are here to go on with. Once the cores are
  // free again it asks them; who has answered has found a core.
  bool gathers(int others);
  // The same: has all go on at `place`, those too that have not answered.
  void call(std::int64_t place);

 private:
  std::atomic<bool> late_{false};  // somebody has waited long
  bool crowded_ = false;           // the answer, written by the last to arrive
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> generation_{0};
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  // Of a recess, under the mutex.
  bool asked_ = false;
  int here_ = 0;
  std::uint32_t calls_ = 0;
  std::int64_t place_ = 0;
};

// Runs body(argument, thread, count) on `threads` threads, or on one where that many cannot be had:
// inside another parallel region, or without OpenMP. Works in forked children too.
void run_threads(int threads, void (*body)(void*, int thread, int count), void* argument);

// Whether a team has waited long a moment ago (the more often, the longer a moment): threads that
// must meet at every step are then slower than one alone.
bool cores_are_crowded();

// Threads that a call may use when the caller names no number.
int default_threads();

}  // namespace fastrnn
