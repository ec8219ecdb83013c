// The barrier: no thread runs ahead of its team, whether the others are quick or asleep. Plain
// threads, not OpenMP's, so that ThreadSanitizer sees every edge.
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/threads.h"

namespace {

long checks = 0;

// Each thread writes its own cell of the round, and after the barrier reads everybody's. Plain
// memory: a barrier that does not order is a data race.
void rounds(int threads, int count, bool slow) {
  fastrnn::Barrier barrier;
  std::vector<int> cells(static_cast<std::size_t>(threads), 0);
  std::vector<int> wrong(static_cast<std::size_t>(threads), 0);
  std::vector<std::thread> team;
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] {
      for (int round = 1; round <= count; ++round) {
        if (slow && round % threads == me)
          std::this_thread::sleep_for(std::chrono::milliseconds(5));
        cells[static_cast<std::size_t>(me)] = round;
        barrier.wait(threads);
        for (const int cell : cells) wrong[static_cast<std::size_t>(me)] += cell != round;
        barrier.wait(threads);
      }
    });
  for (std::thread& thread : team) thread.join();
  for (const int w : wrong) {
    ++checks;
    check::that("every thread sees every other's round", w == 0);
  }
}

// One thread of the team is away for a while at one round: all learn of it at a later one, and all
// at the same.
bool lateness(int threads) {
  fastrnn::Barrier barrier;
  constexpr int kRounds = 50, kLate = 10;
  std::vector<int> told(static_cast<std::size_t>(threads), -1);
  std::vector<std::thread> team;
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] {
      for (int round = 0; round < kRounds; ++round) {
        if (round == kLate && me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        int& mine = told[static_cast<std::size_t>(me)];
        if (barrier.wait(threads) && mine < 0) mine = round;
      }
    });
  for (std::thread& thread : team) thread.join();
  const bool remembered = fastrnn::cores_are_crowded();
  checks += 1 + threads;
  check::that("a long wait is told", told[0] >= 0 && told[0] <= kLate + 1);
  for (const int round : told) check::that("to all at the same meeting", round == told[0]);

  barrier.forget();
  std::vector<int> still(static_cast<std::size_t>(threads), 0);
  team.clear();
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] { still[static_cast<std::size_t>(me)] = barrier.wait(threads); });
  for (std::thread& thread : team) thread.join();
  checks += threads;
  for (const int answer : still) check::that("and forgotten where that is asked for", !answer);
  return remembered;
}

// Parts of the work may end at different times: nobody learns of a long wait between them.
void uneven_parts(int threads) {
  fastrnn::Barrier barrier;
  std::vector<std::thread> team;
  std::vector<int> told(static_cast<std::size_t>(threads), 0);
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] {
      for (int part = 0; part < 3; ++part) {
        if (me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
        told[static_cast<std::size_t>(me)] += barrier.wait(threads, fastrnn::Barrier::Wait::part);
      }
    });
  for (std::thread& thread : team) thread.join();
  checks += 1 + threads;
  for (const int count : told) check::that("uneven parts are not told", count == 0);
  check::that("nor remembered", !fastrnn::cores_are_crowded());
}

// The first thread works on alone, again and again, and has the others go on where it stops: once
// they have answered, or whether or not they have.
void recesses(fastrnn::Barrier& barrier, int threads, bool asks) {
  constexpr int kRecesses = 20;
  barrier.forget();  // the recesses are counted from there
  std::vector<std::int64_t> work(static_cast<std::size_t>(threads), 0);  // plain: see rounds()
  std::vector<int> wrong(static_cast<std::size_t>(threads), 0);
  std::vector<std::thread> team;
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] {
      std::int64_t place = 0;
      for (int recess = 0; recess < kRecesses; ++recess) {
        const auto mine = static_cast<std::size_t>(me);
        if (me == 0) {
          do {
            work[0] = ++place;
          } while (asks && !barrier.gathers(threads - 1));
          barrier.call(place);
        } else {
          place = barrier.rest(static_cast<std::uint32_t>(recess));
        }
        wrong[mine] += place != work[0];
        barrier.wait(threads, fastrnn::Barrier::Wait::part);
        wrong[mine] += barrier.wait(threads, fastrnn::Barrier::Wait::part);
      }
    });
  for (std::thread& thread : team) thread.join();
  checks += threads;
  for (const int w : wrong) check::that("a recess ends where the first thread says", w == 0);
}

// Nobody is asked while the cores are crowded, and everybody is afterwards.
void crowded_recess() {
  fastrnn::Barrier barrier;
  std::vector<std::thread> team;
  for (int me = 0; me < 2; ++me)
    team.emplace_back([&, me] {  // note a late meeting, as lateness() does
      if (me == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));
      barrier.wait(2);
    });
  for (std::thread& thread : team) thread.join();
  const bool at_once = barrier.gathers(0) && fastrnn::cores_are_crowded();
  while (fastrnn::cores_are_crowded()) std::this_thread::yield();
  checks += 2;
  check::that("no recess ends while the cores are crowded", !at_once);
  check::that("it may afterwards", barrier.gathers(0));
}

}  // namespace

int main() {
  uneven_parts(3);
  fastrnn::Barrier barrier;
  recesses(barrier, 2, true);
  recesses(barrier, 5, true);
  recesses(barrier, 3, false);
  rounds(1, 1000, false);
  rounds(2, 20000, false);
  rounds(7, 500, false);  // more threads than cores: yields and sleeps
  rounds(3, 30, true);
  bool remembered = false;  // it is so for two milliseconds, which may pass before anybody looks
  for (int i = 0; i < 10; ++i) remembered |= lateness(i % 2 ? 5 : 2);
  ++checks;
  check::that("a long wait is remembered", remembered);
  crowded_recess();
  return check::result("barrier_test", checks);
}
