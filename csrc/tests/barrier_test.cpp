// The barrier: no thread runs ahead of its team, whether the others are quick or asleep. Plain
// threads, not OpenMP's, so that ThreadSanitizer sees all synchronisation.
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/threads.h"

namespace {

long checks = 0;

// Runs body(me) on each of `threads` threads.
template <class Body>
void in_team(int threads, Body body) {
  std::vector<std::thread> team;
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] { body(static_cast<std::size_t>(me)); });
  for (std::thread& thread : team) thread.join();
}

// In each round every thread writes its own cell, and after the barrier reads all cells. Plain
// memory: a barrier that does not order is a data race.
void rounds(int threads, int count, bool slow) {
  fastrnn::Barrier barrier;
  std::vector<int> cells(static_cast<std::size_t>(threads), 0);
  std::vector<int> wrong(static_cast<std::size_t>(threads), 0);
  in_team(threads, [&](std::size_t me) {
    for (int round = 1; round <= count; ++round) {
      if (slow && round % threads == static_cast<int>(me))
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      cells[me] = round;
      barrier.wait(threads);
      for (const int cell : cells) wrong[me] += cell != round;
      barrier.wait(threads);
    }
  });
  for (const int w : wrong) {
    ++checks;
    check::that("every thread sees every other's round", w == 0);
  }
}

// One thread of the team is late at one round: this is reported to all at the same later round.
bool lateness(int threads) {
  fastrnn::Barrier barrier;
  constexpr int kRounds = 50, kLate = 10;
  std::vector<int> told(static_cast<std::size_t>(threads), -1);
  in_team(threads, [&](std::size_t me) {
    for (int round = 0; round < kRounds; ++round) {
      if (round == kLate && me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      if (barrier.wait(threads) && told[me] < 0) told[me] = round;
    }
  });
  const bool remembered = fastrnn::cores_are_oversubscribed();
  checks += 1 + threads;
  check::that("a long wait is reported", told[0] >= 0 && told[0] <= kLate + 1);
  for (const int round : told) check::that("to all at the same round", round == told[0]);

  barrier.forget();
  std::vector<int> still(static_cast<std::size_t>(threads), 0);
  in_team(threads, [&](std::size_t me) { still[me] = barrier.wait(threads); });
  checks += threads;
  for (const int answer : still) check::that("forgotten by forget()", !answer);
  return remembered;
}

// Parts of the work may end at different times: a long wait between them is not reported.
void uneven_parts(int threads) {
  fastrnn::Barrier barrier;
  std::vector<int> told(static_cast<std::size_t>(threads), 0);
  in_team(threads, [&](std::size_t me) {
    for (int part = 0; part < 3; ++part) {
      if (me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      told[me] += barrier.wait(threads, fastrnn::Barrier::Wait::part);
    }
  });
  checks += 1 + threads;
  for (const int count : told) check::that("uneven parts are not reported", count == 0);
  check::that("nor remembered", !fastrnn::cores_are_oversubscribed());
}

// Solo phases: the first thread works alone and the others resume where it stops, either once they
// are ready (`asks`) or at once.
void solo_phases(fastrnn::Barrier& barrier, int threads, bool asks) {
  constexpr std::uint32_t kPhases = 20;
  barrier.forget();  // solo phases are counted from here
  std::vector<std::int64_t> work(static_cast<std::size_t>(threads), 0);  // plain: see rounds()
  std::vector<int> wrong(static_cast<std::size_t>(threads), 0);
  in_team(threads, [&](std::size_t me) {
    std::int64_t place = 0;
    for (std::uint32_t phase = 0; phase < kPhases; ++phase) {
      if (me == 0) {
        do {
          work[0] = ++place;
        } while (asks && !barrier.all_ready(threads - 1));
        barrier.resume(place);
      } else {
        place = barrier.rest(phase);
      }
      wrong[me] += place != work[0];
      barrier.wait(threads, fastrnn::Barrier::Wait::part);
      wrong[me] += barrier.wait(threads, fastrnn::Barrier::Wait::part);
    }
  });
  checks += threads;
  for (const int w : wrong) check::that("all resume where the first thread stopped", w == 0);
}

// No solo phase ends while the cores are oversubscribed.
void oversubscribed_solo_phase() {
  fastrnn::Barrier barrier;
  in_team(2, [&](std::size_t me) {  // a late wait, as in lateness()
    if (me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    barrier.wait(2);
  });
  const bool at_once = barrier.all_ready(0) && fastrnn::cores_are_oversubscribed();
  while (fastrnn::cores_are_oversubscribed()) std::this_thread::yield();
  checks += 2;
  check::that("no solo phase ends while the cores are oversubscribed", !at_once);
  check::that("it may afterwards", barrier.all_ready(0));
}

}  // namespace

int main() {
  uneven_parts(3);
  fastrnn::Barrier barrier;
  solo_phases(barrier, 2, true);
  solo_phases(barrier, 5, true);
  solo_phases(barrier, 3, false);
  rounds(1, 1000, false);
  rounds(2, 20000, false);
  rounds(7, 500, false);  // more threads than cores: yields and sleeps
  rounds(3, 30, true);
  bool remembered = false;  // for two milliseconds, which may pass before the test looks
  for (int i = 0; i < 10; ++i) remembered |= lateness(i % 2 ? 5 : 2);
  ++checks;
  check::that("a long wait is remembered", remembered);
  oversubscribed_solo_phase();
  return check::result("barrier_test", checks);
}
