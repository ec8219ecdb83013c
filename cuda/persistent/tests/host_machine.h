// The machine of the persistent kernels on a CPU: it runs their source, thread by thread.
//
// A block is a thread of the operating system. Its 256 threads are fibers that yield wherever a GPU
// thread would wait; so blocks race as on a GPU, with the same words, sentinels, buffers and
// barriers. Atomic operations of the same strength, and nothing else, order memory.
// ThreadSanitizer, which knows the fibers through its API, reports a missing barrier of a block, of
// the team or of a cluster as a data race.
//
// Products follow the PTX manual's tables for mma.sync, element by element, and are written
// independently of words.h. Shared memory is filled with NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "persistent/cluster.h"
#include "persistent/words.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace fastrnn::persistent {

inline constexpr long kPatience = 200'000'000;  // iterations of a wait that count as a deadlock

// The state that all blocks of a launch share.
struct HostLaunch {
  std::vector<unsigned char*> memory;  // each block's
  int blocks_of_team = 1;
  std::unique_ptr<std::atomic<int>[]> clusters;  // threads that arrived at the cluster's barrier
  unsigned delays = 0;                           // one in so many iterations sleeps; 0: none
};

class HostBlock;

// The state of one fiber.
struct HostMachine {
  HostBlock* home;
  HostLaunch* launch;
  int number, index;  // of the thread, of the block
  int cluster_turn = 0;
  long turns = 0;       // iterations of the current wait
  unsigned random = 1;  // selects the iterations that sleep

  int thread() const { return number; }
  int block() const { return index; }
  unsigned char* shared() const { return launch->memory[static_cast<std::size_t>(index)]; }
  int opaque(int x) { return x; }
  void prefetch(const float*) {}

  inline void waiting();
  inline void sync();
  inline void converge();
  inline float shuffle_xor(float x, int mask);
  inline u32 shuffle(u32 x, int lane);
  template <class Operand>
  void multiply(Operand, float (&c)[4], const Words& a, u32 b0, u32 b1);

  Words load(const u32* at) {
    Words w;
    for (int i = 0; i < 4; ++i) w.v[i] = __atomic_load_n(at + i, __ATOMIC_RELAXED);
    return w;
  }
  void store(u32* at, u32 word) { __atomic_store_n(at, word, __ATOMIC_RELAXED); }
  void fence() {
#if defined(__SANITIZE_THREAD__)  // it does not know fences
    static std::atomic<int> all{0};
    all.fetch_add(1, std::memory_order_acq_rel);
#else
    std::atomic_thread_fence(std::memory_order_acq_rel);
#endif
  }

  // A barrier: the phase in the top bit, whether thread 0 has yet to arrive in the next, and the
  // bytes still to come, offset so that they may be negative, in the rest.
  static constexpr std::uint64_t kPhase = 1ull << 63, kPending = 1ull << 62, kNone = 1ull << 40;
  static std::uint64_t settled(std::uint64_t state) {
    return (state & ~kPhase) == kNone ? ((state & kPhase) ^ kPhase) | kPending | kNone : state;
  }
  static void change(Barrier* barrier, const std::function<std::uint64_t(std::uint64_t)>& f) {
    std::uint64_t now = __atomic_load_n(&barrier->opaque, __ATOMIC_RELAXED);
    while (!__atomic_compare_exchange_n(&barrier->opaque, &now, settled(f(now)), false,
                                        __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
    }
  }
  void barrier_init(Barrier* barrier) {
    __atomic_store_n(&barrier->opaque, kPending | kNone, __ATOMIC_RELEASE);
  }
  void barrier_expect(Barrier* barrier, int bytes) {
    change(barrier,
           [&](std::uint64_t s) { return (s & ~kPending) + static_cast<std::uint64_t>(bytes); });
  }
  void barrier_wait(Barrier* barrier, unsigned parity) {
    while (((__atomic_load_n(&barrier->opaque, __ATOMIC_ACQUIRE) & kPhase) != 0) == (parity != 0))
      waiting();
  }
  void send(int to_block, u32* to, const Words& words, Barrier* barrier) {
    const auto there = [&](const void* at) {
      const int first = index / launch->blocks_of_team * launch->blocks_of_team;
      return launch->memory[static_cast<std::size_t>(first + to_block)] +
             (static_cast<const unsigned char*>(at) - shared());
    };
    std::memcpy(there(to), &words, sizeof words);
    change(reinterpret_cast<Barrier*>(there(barrier)),
           [](std::uint64_t s) { return s - sizeof(Words); });
  }
  void cluster_sync() {
    const int all = launch->blocks_of_team * kThreads;
    std::atomic<int>& come =
        launch->clusters[static_cast<std::size_t>(index / launch->blocks_of_team)];
    come.fetch_add(1, std::memory_order_acq_rel);
    ++cluster_turn;
    while (come.load(std::memory_order_acquire) < cluster_turn * all) waiting();
  }
};

// A barrier for the 32 lanes of a warp, or the threads of a block: the last one to arrive does the
// work for all, then all continue.
struct Meeting {
  std::atomic<int> come{0};
  std::atomic<unsigned> turn{0};
};

class HostBlock {
 public:
  HostBlock(HostLaunch& launch, int index, std::function<void(HostMachine&)> kernel)
      : launch_(launch), index_(index), kernel_(std::move(kernel)) {}

  // Runs all threads of the block to their end.
  void run() {
#if defined(__SANITIZE_THREAD__)
    scheduler_ = __tsan_get_current_fiber();
#endif
    for (int i = 0; i < kThreads; ++i) start(i);
    for (int left = kThreads; left > 0;) {
      for (Fiber& f : fibers_) {
        if (f.done.load(std::memory_order_acquire)) continue;
        enter(f);
        if (f.done.load(std::memory_order_acquire)) --left;
      }
      std::this_thread::yield();
    }
#if defined(__SANITIZE_THREAD__)
    for (Fiber& f : fibers_) __tsan_destroy_fiber(f.tsan);
#endif
  }

  // Switches from thread `number` to the next; returns when it is scheduled again.
  void give_way(int number) {
    Fiber& f = fibers_[number];
    f.machine.random = f.machine.random * 1664525u + 1013904223u;
    if (launch_.delays && (f.machine.random >> 8) % launch_.delays == 0)
      std::this_thread::sleep_for(std::chrono::microseconds(200));
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&f.context, &context_);
  }

  template <class Work>
  void meet(Meeting& meeting, int size, int number, Work&& work) {
    const unsigned turn = meeting.turn.load(std::memory_order_relaxed);
    if (meeting.come.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      work();
      meeting.come.store(0, std::memory_order_relaxed);
      meeting.turn.store(turn + 1, std::memory_order_release);
    } else {
      for (long turns = 0; meeting.turn.load(std::memory_order_acquire) == turn; ++turns) {
        expect_less(turns);
        give_way(number);
      }
    }
  }

  void expect_less(long turns) const {
    if (turns < kPatience) return;
    std::printf("FAILED deadlock: block %d\n", index_);
    std::abort();
  }

  struct Warp {
    Meeting meeting;
    Words a[kLanes];
    u32 in[kLanes], b[kLanes][2], out[kLanes];
    float c[kLanes][4], sums[kLanes][4];
  };
  Warp warps[kWarps];
  Meeting all;

 private:
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    HostMachine machine;
    HostBlock* home;
    std::atomic<bool> done{false};
    void* tsan = nullptr;
  };

  void start(int i) {
    Fiber& f = fibers_[i];
    f.stack.reset(new unsigned char[kStack]);  // not initialised, so most pages are never committed
    f.machine = HostMachine{this, &launch_, i, index_};
    f.machine.random = static_cast<unsigned>(index_ * kThreads + i);
    f.home = this;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = &context_;
    const auto address = reinterpret_cast<std::uintptr_t>(&f);
    makecontext(&f.context, reinterpret_cast<void (*)()>(&HostBlock::enter_fiber), 2,
                static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
#if defined(__SANITIZE_THREAD__)
    f.tsan = __tsan_create_fiber(0);
#endif
  }

  void enter(Fiber& f) {
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&context_, &f.context);
  }

  static void enter_fiber(unsigned high, unsigned low) {
    Fiber& f = *reinterpret_cast<Fiber*>(static_cast<std::uintptr_t>(high) << 32 | low);
    f.home->kernel_(f.machine);
    f.done.store(true, std::memory_order_release);
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(f.home->scheduler_, __tsan_switch_to_fiber_no_sync);
#endif
    swapcontext(&f.context, &f.home->context_);
  }

  static constexpr std::size_t kStack = 256 << 10;
  HostLaunch& launch_;
  int index_;
  std::function<void(HostMachine&)> kernel_;
  Fiber fibers_[kThreads];
  ucontext_t context_;
  [[maybe_unused]] void* scheduler_ = nullptr;
};

inline void HostMachine::waiting() {
  home->expect_less(++turns);
  home->give_way(number);
}

inline void HostMachine::sync() {
  home->meet(home->all, kThreads, number, [] {});
}

inline void HostMachine::converge() {
  home->meet(home->warps[number / kLanes].meeting, kLanes, number, [] {});
}

inline u32 HostMachine::shuffle(u32 x, int lane) {
  HostBlock::Warp& w = home->warps[number / kLanes];
  w.in[number % kLanes] = x;
  home->meet(w.meeting, kLanes, number, [&] { std::memcpy(w.out, w.in, sizeof w.in); });
  return w.out[lane];
}

inline float HostMachine::shuffle_xor(float x, int mask) {
  return float_of(shuffle(bits_of(x), (number % kLanes) ^ mask));
}

// ---- products, by the tables of the PTX manual --------------------------------------------------

// A is 16 × K, B is K × 8, C is 16 × 8; `Operand` defines the content of a register.
template <class Operand>
struct Tables;

// m16n8k16: register r of A holds elements 2r and 2r + 1; the same for B.
template <class Half>
struct HalfTables {
  static constexpr int K = 16, kElements = 2;
  static int a_row(int lane, int i) { return lane / 4 + ((i >= 2 && i < 4) || i >= 6 ? 8 : 0); }
  static int a_column(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
  static int b_row(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
  static float element(u32 word, int i) {
    return Half::load(static_cast<std::uint16_t>(i & 1 ? word >> 16 : word));
  }
};
template <>
struct Tables<BFloat16> : HalfTables<BFloat16> {};
template <>
struct Tables<Float16> : HalfTables<Float16> {};

// m16n8k8: one element per register; the tensor cores ignore the last 13 bits.
template <>
struct Tables<Tf32> {
  static constexpr int K = 8, kElements = 1;
  static int a_row(int lane, int i) { return lane / 4 + (i == 1 || i == 3 ? 8 : 0); }
  static int a_column(int lane, int i) { return lane % 4 + (i >= 2 ? 4 : 0); }
  static int b_row(int lane, int i) { return lane % 4 + (i >= 1 ? 4 : 0); }
  static float element(u32 word, int) { return float_of(word & 0xffffe000u); }
};

template <class Operand>
void product(HostBlock::Warp& w) {
  using T = Tables<Operand>;
  constexpr int kA = 4 * T::kElements, kB = 2 * T::kElements;
  float a[16][T::K], b[T::K][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < kA; ++i)
      a[T::a_row(lane, i)][T::a_column(lane, i)] = T::element(w.a[lane].v[i / T::kElements], i);
    for (int i = 0; i < kB; ++i)
      b[T::b_row(lane, i)][lane / 4] = T::element(w.b[lane][i / T::kElements], i);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + (i & 1);
      float sum = w.c[lane][i];
      for (int k = 0; k < T::K; ++k) sum += a[row][k] * b[k][column];
      w.sums[lane][i] = sum;
    }
}

template <class Operand>
void HostMachine::multiply(Operand, float (&c)[4], const Words& a, u32 b0, u32 b1) {
  if constexpr (std::is_same_v<Operand, Float32>) {  // three products, as machine.cuh has them
    Words high, low;
    for (int i = 0; i < 4; ++i) {
      high.v[i] = Float32::high(a.v[i]);
      low.v[i] = Float32::low(a.v[i], high.v[i]);
    }
    const u32 high0 = Float32::high(b0), high1 = Float32::high(b1);
    multiply(Tf32{}, c, low, high0, high1);
    multiply(Tf32{}, c, high, Float32::low(b0, high0), Float32::low(b1, high1));
    multiply(Tf32{}, c, high, high0, high1);
  } else {
    const int lane = number % kLanes;
    HostBlock::Warp& w = home->warps[number / kLanes];
    w.a[lane] = a;
    w.b[lane][0] = b0, w.b[lane][1] = b1;
    std::memcpy(w.c[lane], c, sizeof c);
    home->meet(w.meeting, kLanes, number, [&] { product<Operand>(w); });
    std::memcpy(c, w.sums[lane], sizeof c);
  }
}

// ---- a launch -----------------------------------------------------------------------------------

// Runs kernel(machine) on every thread of every block. A team's blocks run concurrently, and so do
// `teams_at_once` teams; the other teams run after them.
inline void run_on_host(int blocks, int blocks_of_team, int shared_bytes, int teams_at_once,
                        unsigned delays, const std::function<void(HostMachine&)>& kernel) {
  HostLaunch launch;
  launch.blocks_of_team = blocks_of_team;
  launch.delays = delays;
  const std::size_t teams = static_cast<std::size_t>(blocks / blocks_of_team);
  launch.clusters = std::make_unique<std::atomic<int>[]>(teams);
  std::vector<std::vector<Words>> memory(static_cast<std::size_t>(blocks));
  for (auto& m : memory) {
    m.assign(static_cast<std::size_t>(shared_bytes) / sizeof(Words) + 1,
             Words{{0xffffffffu, 0xffffffffu, 0xffffffffu, 0xffffffffu}});
    launch.memory.push_back(reinterpret_cast<unsigned char*>(m.data()));
  }
  const int wave = teams_at_once * blocks_of_team;
  for (int first = 0; first < blocks; first += wave) {
    std::vector<std::thread> running;
    for (int b = first; b < blocks && b < first + wave; ++b)
      running.emplace_back([&, b] {
        auto block = std::make_unique<HostBlock>(launch, b, kernel);
        block->run();
      });
    for (std::thread& t : running) t.join();
  }
}

}  // namespace fastrnn::persistent
