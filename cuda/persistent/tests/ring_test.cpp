// The ring's protocol (ring.h) on a weak memory, and variants of the protocol with faults.
//
// WeakMemory keeps every value that a word has had. A relaxed load may return any of them that is
// not excluded by the view of its thread. A fence, as in C++ and PTX, transfers views: a store
// after a fence carries the view at that fence, and a thread that loads the value and then executes
// a fence acquires that view. So an order that the protocol does not enforce is eventually violated
// here, on any processor, and the reader takes a value of another message.
//
// Threads act as small blocks: each writes its words of a message after it has received the whole
// previous message. The words contain the number of their message, so a stale word is detected when
// it is taken.
#include "persistent/ring.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../../../csrc/tests/check.h"

namespace {

using namespace fastrnn::persistent;

long checks = 0;

using View = std::vector<int>;  // the oldest readable position in the history of each word

void join(View& into, const View& other) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

class WeakMemory {
 public:
  explicit WeakMemory(std::size_t words) : histories_(words) {
    for (auto& h : histories_) h.push_back({kSentinel, View(words, 0)});
  }

  // The interface for one thread: Memory in ring.h.
  class Thread {
   public:
    Thread(WeakMemory& home, const u32* base, unsigned seed, bool fences)
        : home_(home),
          base_(base),
          random_(seed),
          fences_(fences),
          seen_(home.histories_.size(), 0),
          received_(seen_),
          released_(seen_) {}

    u32 load(const u32* at) {
      const std::lock_guard<std::mutex> lock(home_.mutex_);
      const auto word = static_cast<std::size_t>(at - base_);
      const auto& history = home_.histories_[word];
      const int newest = static_cast<int>(history.size()) - 1;
      int from = seen_[word];
      // Mostly the oldest allowed value, which is the weakest behaviour; sometimes the newest.
      if (random_() % 4 == 0)
        from = newest;
      else if (random_() % 4 == 0)
        from += static_cast<int>(random_() % unsigned(newest - from + 1));
      seen_[word] = from;
      join(received_, history[static_cast<std::size_t>(from)].view);
      return history[static_cast<std::size_t>(from)].value;
    }
    void store(u32* at, u32 value) {
      const std::lock_guard<std::mutex> lock(home_.mutex_);
      const auto word = static_cast<std::size_t>(at - base_);
      auto& history = home_.histories_[word];
      seen_[word] = static_cast<int>(history.size());
      View view = released_;
      view[word] = seen_[word];
      history.push_back({value, view});
    }
    void fence() {
      if (!fences_) return;
      join(seen_, received_);
      released_ = seen_;
    }

   private:
    WeakMemory& home_;
    const u32* base_;
    std::minstd_rand random_;
    bool fences_;
    View seen_, received_, released_;
  };

 private:
  struct Store {
    u32 value;
    View view;
  };
  std::mutex mutex_;
  std::vector<std::vector<Store>> histories_;
};

// Ordinary atomics, for ThreadSanitizer and for speed.
struct Atomics {
  u32 load(const u32* at) { return __atomic_load_n(at, __ATOMIC_RELAXED); }
  void store(u32* at, u32 value) { __atomic_store_n(at, value, __ATOMIC_RELAXED); }
  void fence() {
#if defined(__SANITIZE_THREAD__)
    static std::atomic<int> all{0};
    all.fetch_add(1, std::memory_order_acq_rel);
#else
    std::atomic_thread_fence(std::memory_order_acq_rel);
#endif
  }
};

// The deliberate fault of a variant.
enum class Fault { none, no_fences, no_clearing, early_clearing };

struct Setup {
  int blocks, words, messages, period;
  Fault fault = Fault::none;
  bool delays = false;
};

u32 word_of_message(int message, int block, int word) {
  return static_cast<u32>((message * 64 + block) * 64 + word);
}

Ring ring_for(const Setup& s, u32* words) {
  Ring ring;
  ring.words = words;
  ring.period = s.period;
  ring.message_words = s.blocks * s.words;
  return ring;
}

template <class Memory>
void publish_all(Memory& memory, const Setup& s, const Ring& ring, int message, int block) {
  begin_message(memory, ring, message);
  for (int w = 0; w < s.words; ++w) {
    const std::int64_t at = block * s.words + w;
    const u32 value = word_of_message(message, block, w);
    if (s.fault == Fault::no_clearing)
      memory.store(ring.slot(message) + at, value);
    else if (s.fault == Fault::early_clearing) {  // the previous message, which is still being read
      memory.store(ring.slot(message) + at, value);
      memory.store(ring.slot(message + kEpochs * ring.period - 1) + at, kSentinel);
    } else
      publish(memory, ring, message, at, value);
  }
}

// The number of words taken from another message; −1: the words of some message never arrived.
template <class Memory>
int receive_all(Memory& memory, const Setup& s, const Ring& ring, int message,
                const std::atomic<bool>& stop) {
  int wrong = 0;
  for (int b = 0; b < s.blocks; ++b)
    for (int w = 0; w < s.words; ++w) {
      u32 word;
      while (!arrived(word = memory.load(ring.slot(message) + b * s.words + w))) {
        if (stop.load(std::memory_order_relaxed)) return -1;
        std::this_thread::yield();
      }
      wrong += word != word_of_message(message, b, w);
    }
  return wrong;
}

struct Outcome {
  bool stale = false, stuck = false;
};

template <class MakeMemory>
Outcome run(const Setup& s, u32* words, MakeMemory make) {
  std::atomic<int> wrong{0}, done{0};
  std::atomic<bool> stop{false}, stuck{false};
  std::vector<std::thread> blocks;
  for (int me = 0; me < s.blocks; ++me)
    blocks.emplace_back([&, me] {
      auto memory = make(me);
      const Ring ring = ring_for(s, words);
      publish_all(memory, s, ring, 0, me);
      for (int m = 0; m < s.messages; ++m) {
        if (s.delays && (m + me) % 97 == 0)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        const int found = receive_all(memory, s, ring, m, stop);
        if (found != 0) {
          (found < 0 ? stuck : stop) = true;
          if (found > 0) ++wrong;
          break;
        }
        if (m + 1 < s.messages) publish_all(memory, s, ring, m + 1, me);
      }
      ++done;
    });
  // A fault may also lose a word: then all threads wait until the time limit.
  const auto end =
      std::chrono::steady_clock::now() + std::chrono::seconds(s.fault == Fault::none ? 500 : 10);
  while (done < s.blocks && std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if (done < s.blocks) stop = true;
  for (std::thread& t : blocks) t.join();
  return {wrong > 0, stuck && wrong == 0};
}

Outcome run_weak(const Setup& s, unsigned seed) {
  const auto size = static_cast<std::size_t>(kEpochs * s.period * s.blocks * s.words);
  std::vector<u32> addresses(size);
  WeakMemory memory(size);
  return run(s, addresses.data(), [&](int me) {
    return WeakMemory::Thread(memory, addresses.data(), seed * 31 + unsigned(me) + 1,
                              s.fault != Fault::no_fences);
  });
}

Outcome run_atomics(const Setup& s) {
  std::vector<u32> words(static_cast<std::size_t>(kEpochs * s.period * s.blocks * s.words),
                         kSentinel);
  return run(s, words.data(), [](int) { return Atomics{}; });
}

void expect_right(const char* what, const Outcome& o) {
  ++checks;
  check::that(what, !o.stale && !o.stuck);
}

// The fault must be detected with at least one of a few seeds.
void expect_caught(const char* what, Setup s, Fault fault) {
  s.fault = fault;
  bool caught = false;
  for (unsigned seed = 0; seed < 20 && !caught; ++seed) {
    const Outcome o = run_weak(s, seed);
    caught = o.stale || o.stuck;
  }
  ++checks;
  check::that(what, caught);
}

}  // namespace

int main() {
  for (const int period : {1, 2, 4})
    for (const int blocks : {1, 2, 3})
      for (unsigned seed = 0; seed < 3; ++seed)
        expect_right("weak memory", run_weak({blocks, 2, 60, period}, seed));
  expect_right("many messages", run_atomics({3, 4, 20000, 8}));
  expect_right("epochs of one message", run_atomics({2, 2, 20000, 1}));
  expect_right("delayed blocks", run_atomics({4, 2, 2000, 4, Fault::none, true}));
  expect_caught("no fences", {3, 2, 200, 2}, Fault::no_fences);
  expect_caught("no clearing", {3, 2, 200, 2}, Fault::no_clearing);
  expect_caught("clearing too early", {3, 2, 200, 4}, Fault::early_clearing);
  return check::result("persistent ring", checks);
}
