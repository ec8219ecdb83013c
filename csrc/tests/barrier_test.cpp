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
void lateness(int threads) {
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
  checks += 2 + threads;
  check::that("a long wait is told", told[0] >= 0 && told[0] <= kLate + 1);
  check::that("and remembered", fastrnn::cores_are_crowded());
  for (const int round : told) check::that("to all at the same meeting", round == told[0]);

  barrier.forget();
  std::vector<int> still(static_cast<std::size_t>(threads), 0);
  team.clear();
  for (int me = 0; me < threads; ++me)
    team.emplace_back([&, me] { still[static_cast<std::size_t>(me)] = barrier.wait(threads); });
  for (std::thread& thread : team) thread.join();
  checks += threads;
  for (const int answer : still) check::that("and forgotten where that is asked for", !answer);
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

}  // namespace

int main() {
  uneven_parts(3);
  rounds(1, 1000, false);
  rounds(2, 20000, false);
  rounds(7, 500, false);  // more threads than cores: yields and sleeps
  rounds(3, 30, true);
  lateness(2);
  lateness(5);
  return check::result("barrier_test", checks);
}
