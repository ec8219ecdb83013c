// The exchange of the state between blocks without common shared memory: through L2, with data that
// is its own flag.
//
// Message        message m contains the values of the previous step that step m needs: one array of
//                words for each team of blocks. Every word has one writer, which is the same thread
//                for every message, and any number of readers.
// The ring       has 4·P slots; message m is in slot m mod 4·P. An epoch is P messages, so the ring
//                holds four epochs. Before the launch every word is the sentinel.
// A writer       of message m stores, for each of its words, the word in slot m, then the sentinel
//                in slot (m + 2P) mod 4P. Before the first message of an epoch it executes a fence.
// A reader       loads the word in slot m repeatedly until it is not the sentinel. There is no
//                flag, no atomic read-modify-write, no second round trip. All accesses are 32-bit
//                words, relaxed at device scope, so each is indivisible and goes to L2.
// The sentinel   is a NaN pattern that no rounding produces. A word with this pattern is stored as
//                another NaN.
//
// Why a reader takes the word of its own message, and never an older one.
//   Slot m mod 4P holds in sequence: the word of message m − 4P, the sentinel stored with message
//   m − 2P, the word of message m. One thread stores all three, so every thread sees them in this
//   order. The reader must not see the first. Let e be the epoch of m; the sentinel is stored in
//   epoch e − 2. The writer's fence at the start of epoch e − 1 comes after it, and the reader has
//   read words of that writer that were stored after that fence, in epoch e − 1; then the reader
//   executes its own fence, at the start of epoch e. From fence to fence, the sentinel happens
//   before the reader's first load from the slot.
// Why no thread clears or overwrites a word that another thread still has to read.
//   The sentinel of message m overwrites the word of message m − 2P, of epoch e − 2. Its readers
//   read it before their fence at the start of epoch e − 1, and only then stored words of epoch
//   e − 1, because a block publishes message n only after it has received message n − 1. Before it
//   clears, the writer has received words of every block of the team from epoch e − 1, and executed
//   a fence at the start of epoch e. Hence the loads are ordered before the stores.
// Why it cannot deadlock.
//   The blocks are co-resident (a cooperative launch). Message 0 is published without waiting,
//   message m + 1 once all of message m has been received: by induction each message arrives.
//
// The argument requires that each thread that stores has, between two of its own fences, received
// words from every block of the team, itself or through a barrier with a thread that has; the
// kernels' barrier at each step is such a barrier.
//
// `Memory` is the memory of the words: the device's (machine.cuh), plain atomics on the host, or
// the weak memory of cuda/persistent/tests/ring_test.cpp, in which a load returns any value that
// the rules allow.
#pragma once

#include "persistent/words.h"

namespace fastrnn::persistent {

inline constexpr u32 kSentinel = 0xffffffffu;
inline constexpr u32 kOtherNaN = 0x7fff7fffu;  // a NaN as one float, and as two halves
inline constexpr int kEpochs = 4;

struct Ring {
  u32* words = nullptr;  // [4·period][message_words]
  int period = 1;        // messages per epoch, a power of two
  std::int64_t message_words = 0;

  FASTRNN_HOST_DEVICE u32* slot(int message) const {
    return words + (message & (kEpochs * period - 1)) * message_words;
  }
  FASTRNN_HOST_DEVICE bool opens_epoch(int message) const { return (message & (period - 1)) == 0; }
};

FASTRNN_HOST_DEVICE bool arrived(u32 word) { return word != kSentinel; }
FASTRNN_HOST_DEVICE bool arrived(const Words& w) {
  return arrived(w.v[0]) && arrived(w.v[1]) && arrived(w.v[2]) && arrived(w.v[3]);
}

// Every thread of the block, writer or reader, calls this before the first word of a message.
template <class Memory>
FASTRNN_ON_MACHINE void begin_message(Memory& memory, const Ring& ring, int message) {
  if (ring.opens_epoch(message)) memory.fence();
}

template <class Memory>
FASTRNN_ON_MACHINE void publish(Memory& memory, const Ring& ring, int message, std::int64_t at,
                                u32 word) {
  memory.store(ring.slot(message) + at, word == kSentinel ? kOtherNaN : word);
  memory.store(ring.slot(message + 2 * ring.period) + at, kSentinel);
}

}  // namespace fastrnn::persistent
