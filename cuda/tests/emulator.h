// Runs kernels on the CPU: every thread of every block, one after another, phase by phase.
//
// The test selects the order of threads and blocks, and can run the same kernels in several orders:
// if the bits of a result depend on the order, a barrier is missing or blocks race. Shared memory
// and registers are filled with NaN, which exposes reads before writes.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "kernel.h"

namespace fastrnn::cuda {

enum class Order { forwards, backwards, shuffled };

struct Emulator {
  Order order = Order::forwards;
  long launches = 0;
};

inline Emulator& emulator() {
  static Emulator one;
  return one;
}

inline std::vector<Index> in_order(Index count) {
  std::vector<Index> all(static_cast<std::size_t>(count));
  std::iota(all.begin(), all.end(), Index{0});
  if (emulator().order == Order::backwards)
    std::reverse(all.begin(), all.end());
  else if (emulator().order == Order::shuffled)
    std::shuffle(all.begin(), all.end(), std::mt19937_64(static_cast<unsigned>(count)));
  return all;
}

template <int phase, class Kernel>
void emulate_phases(const Kernel& kernel, Index block, Index round,
                    const std::vector<Index>& threads, typename Kernel::Shared& shared,
                    std::vector<typename Kernel::Registers>& registers) {
  for (const Index thread : threads)
    kernel.template run<phase>(block, static_cast<int>(thread), round, shared,
                               registers[static_cast<std::size_t>(thread)]);
  if constexpr (phase + 1 < Kernel::phases)
    emulate_phases<phase + 1>(kernel, block, round, threads, shared, registers);
}

template <class Kernel>
void launch(void*, const Kernel& kernel) {
  ++emulator().launches;
  const std::vector<Index> threads = in_order(kThreads);
  for (const Index block : in_order(kernel.blocks())) {
    typename Kernel::Shared shared;
    std::vector<typename Kernel::Registers> registers(kThreads);
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    std::memset(static_cast<void*>(registers.data()), 0xff, sizeof(registers[0]) * kThreads);
    for (Index round = 0; round < kernel.rounds(); ++round)
      emulate_phases<0>(kernel, block, round, threads, shared, registers);
  }
}

}  // namespace fastrnn::cuda
