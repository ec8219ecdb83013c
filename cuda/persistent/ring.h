// How blocks that share no shared memory hand the state on: through L2, the data being its own
// flag.
//
// What travels   message m is what step m needs of the step before it: one array of words for each
//                team of blocks. Every word has one writer, the same thread for every message, and
//                any number of readers.
// The ring       4·P slots, message m in slot m mod 4·P. An epoch is P messages, so the ring holds
//                four epochs. Before the launch every word is the sentinel.
// A writer       of message m, for each word of its own: stores the word in slot m, then stores the
//                sentinel in slot (m + 2P) mod 4P. At the first message of an epoch it fences
//                first.
// A reader       loads the word in slot m again and again until it is not the sentinel. No flag, no
//                atomic read-modify-write, no second round trip. All accesses are 32-bit words that
//                are relaxed at device scope, so each is seen whole and goes to L2.
// The sentinel   is a NaN pattern that no rounding makes. A word that has it all the same is stored
//                as another NaN.
//
// Why a reader takes the word of its own message, and never an older one.
//   Slot m mod 4P holds, one after the other: the word of message m − 4P, the sentinel stored with
//   message m − 2P, the word of message m. All three come from one thread and so are seen in this
//   order by everybody. The reader must not meet the first. Let e be the epoch of m; the sentinel
//   is stored in epoch e − 2. The writer's fence at the start of epoch e − 1 comes after it, and
//   the reader has read words of that writer's that were stored after that fence, in epoch e − 1;
//   then the reader has its own fence, at the start of epoch e. Fence to fence, the sentinel
//   happens before the reader's first load from the slot.
// Why no word is cleared or overwritten that somebody still has to read.
//   The sentinel of message m goes over the word of message m − 2P, of epoch e − 2. Its readers
//   read it before their fence at the start of epoch e − 1, and only then stored words of epoch e −
//   1, for a block publishes message n only after it has received message n − 1. The writer has
//   received words of every block of the team from epoch e − 1, and fenced at the start of epoch e,
//   before it clears. Hence the two loads and stores are ordered, reads first.
// Why it cannot deadlock.
//   The blocks are co-resident (a cooperative launch). Message 0 is published without waiting,
//   message m + 1 once all of message m has been received: by induction each message arrives.
//
// For this each thread that stores must, between two of its own fences, have received from every
// block of the team, itself or by a barrier with a thread that has; the kernels' barrier at each
// step is one.
//
// `Memory` is what the words live in: the device's (machine.cuh), plain atomics on the host, or
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
  int period = 1;        // messages of an epoch, a power of two
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

// Before the first word of a message: every thread of the block, writers and readers.
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
