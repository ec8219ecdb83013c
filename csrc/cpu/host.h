// What the files compiled for the baseline of the architecture share: memory taken from a
// workspace, the barriers of a call, and the costs by which a team is sized.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "../problem.h"
#include "threads.h"

namespace fastrnn {

// The cell's place in AllCells. Throws std::invalid_argument where no such cell exists.
int cell_index(const Options& options);

// Takes blocks from the start of a workspace, 64-byte aligned; a null base only counts the bytes.
struct HostArena {
  char* base;
  std::size_t used = 0;
  void* take(std::size_t bytes) {
    void* block = base ? base + used : nullptr;
    used += (bytes + 63) / 64 * 64;
    return block;
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

// Costs in nanoseconds, of a core with two vector multiply-adds a clock. Good enough to choose
// between plans whose times differ clearly.
inline constexpr double kClock = 3.5;           // clocks a nanosecond
inline constexpr double kInner = 150;           // bytes a nanosecond from a core's own cache
inline constexpr double kOuter = 80;            // bytes a nanosecond from the shared cache
inline constexpr double kInnerBytes = 1 << 20;  // size of a core's own cache
inline constexpr double kCell = 1.5;            // nanoseconds of a hidden unit's cell
inline constexpr double kBarrier = 500;         // a barrier of the team
inline constexpr double kRegion = 2000;         // waking the team
// A larger team must be faster by this factor: its cores may be busy with other work, and one late
// thread delays all.
inline constexpr double kGain = 0.8;
// Splitting hidden units must be faster by this factor more, for its barrier at every step.
inline constexpr double kGainOfUnits = 0.9;
// From this many weights on, packing runs in parallel.
inline constexpr std::int64_t kRegionWeights = 1 << 18;

}  // namespace fastrnn
