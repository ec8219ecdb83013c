// What backend.cpp and int8.cpp share: memory cut into pieces, the barriers of a call, the costs by
// which a team is sized. Compiled for the baseline of the architecture alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "../problem.h"
#include "threads.h"

namespace fastrnn {

// The cell's place in AllCells. Throws std::invalid_argument where no such cell exists.
int cell_index(const Options& options);

// Takes memory piece by piece, 64-byte aligned; from nothing, it only counts.
struct HostArena {
  char* base;
  std::size_t used = 0;
  void* take(std::size_t bytes) {
    void* piece = base ? base + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return piece;
  }
};

// The barriers of a call, which live in its workspace.
class Barriers {
 public:
  Barriers(Barrier* at, int count) : at_(at), count_(count) {
    for (int i = 0; i < count; ++i) new (at + i) Barrier;
  }
  ~Barriers() {
    for (int i = 0; i < count_; ++i) at_[i].~Barrier();
  }
  Barriers(const Barriers&) = delete;
  Barriers& operator=(const Barriers&) = delete;

 private:
  Barrier* at_;
  int count_;
};

// In nanoseconds of a core that adds two vectors of products a clock: good for choosing between
// ways whose times differ by much.
inline constexpr double kClock = 3.5;           // clocks a nanosecond
inline constexpr double kInner = 150;           // bytes a nanosecond that a core reads from its own
                                                // cache
inline constexpr double kOuter = 80;            // and from the one it shares
inline constexpr double kInnerBytes = 1 << 20;  // size of a core's own cache
inline constexpr double kCell = 1.5;            // nanoseconds of a hidden unit's cell
inline constexpr double kBarrier = 500;         // a meeting of the team
inline constexpr double kRegion = 2000;         // waking it
// More threads must be worth it: they are another's as well, and a busy one holds up the others.
inline constexpr double kGain = 0.8;
// And shared units worth their meetings: whichever thread is disturbed, all wait.
inline constexpr double kGainOfUnits = 0.9;
// Weights worth a parallel region to pack them.
inline constexpr std::int64_t kRegionWeights = 1 << 18;

}  // namespace fastrnn
