// How the blocks of a cluster hand the state on: straight into each other's shared memory.
//
// What travels   message m, [rows][row_words], into buffer m mod 2 of every block of the cluster,
//                by asynchronous stores of 16 bytes (st.async), each of which counts its bytes on
//                barrier m mod 2 of the block that it goes to (mbarrier transactions).
// A reader       waits until its barrier's phase m / 2 is complete: the one arrival, its own thread
//                0's, which also said how many bytes to expect, and all the bytes. The wait
//                acquires at cluster scope what the stores released, so it sees the whole message.
// Two buffers    hold the message being read and the one that comes.
//
// Why nothing is overwritten that somebody still reads.
//   Buffer m mod 2 of block Y held message m − 2. X stores message m there after X has received the
//   whole of message m − 1, of which Y sent a part. Y sent the last of it behind the barrier of its
//   last pass over message m − 2, at which all of its warps had read what they needed.
// Why phases are not mixed up.
//   A barrier's phase for message m + 2 opens when the one for message m has completed, and bytes
//   of message m + 2 are sent only by blocks that have received message m + 1 of this very block,
//   which it sends after having waited for message m. Bytes may come before thread 0 says how many
//   to expect: the count of bytes may be negative for a while, and the phase stays open until
//   thread 0 arrives.
// Why it cannot deadlock.
//   The blocks of a cluster run at the same time. Message 0 is sent without waiting, message m + 1
//   once message m is complete.
// Begin and end
//   The cluster meets once before the first store, so that every barrier is initialised, and once
//   after the last wait, so that no block is gone while another still stores into it.
#pragma once

#include "persistent/words.h"

namespace fastrnn::persistent {

struct alignas(8) Barrier {
  std::uint64_t opaque;
};

// The barrier's phase that message m completes, counted from 0.
FASTRNN_HOST_DEVICE unsigned phase_parity(int message) {
  return static_cast<unsigned>(message >> 1) & 1u;
}

// A warp sends the words of 16 units of two rows to every block. `word` is the lane's, of the unit
// and row of Item; with two units to a word, that of the even lanes. `quarter` says which two rows
// of the tile of 8 that begins at `first_row`. The words of a row are put together by shuffles into
// pieces of 16 bytes, and the pieces times the blocks are dealt to the lanes.
template <int unit_words, class Machine>
FASTRNN_ON_MACHINE void send_to_cluster(Machine& machine, int lane, int quarter, u32 word,
                                        int blocks, int rows, int first_row, u32* to, int stride,
                                        Barrier* barrier) {
  constexpr int kPieces = unit_words / 4;  // of a row
  constexpr int kPer = kUnits / unit_words;
  const int piece = lane % kPieces, second = lane / kPieces % 2;
  Words words;
  FASTRNN_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int unit = (4 * piece + k) * kPer;
    const int from = 4 * ((unit / 2) ^ (2 * quarter)) + 2 * second + unit % 2;
    words.v[k] = machine.shuffle(word, from);
  }
  const int row = first_row + 2 * quarter + second;
  if (row >= rows) return;
  constexpr int kDealt = 2 * kPieces;  // lanes for each block
  for (int block = lane / kDealt; block < blocks; block += kLanes / kDealt)
    machine.send(block, to + row * stride + 4 * piece, words, barrier);
}

}  // namespace fastrnn::persistent
