// The exchange of the state within a cluster: each block stores directly into the shared memory of
// the others.
//
// Message        message m, [rows][row_words], is stored in buffer m mod 2 of every block of the
//                cluster, with asynchronous stores of 16 bytes (st.async). Each store counts its
//                bytes on barrier m mod 2 of the receiving block (mbarrier transactions).
// A reader       waits until phase m / 2 of its barrier is complete: one arrival, by its own thread
//                0, which also sets the number of expected bytes, and all the bytes. The wait
//                acquires at cluster scope what the stores release, so the reader sees the whole
//                message.
// Two buffers    hold the message that is being read and the next one.
//
// Why no block overwrites data that another block still reads.
//   Buffer m mod 2 of block Y held message m − 2. X stores message m there after X has received the
//   whole message m − 1, of which Y sent a part. Y sent the last of it after the barrier of its
//   last pass over message m − 2, at which all its warps had read their data.
// Why phases cannot be confused.
//   A barrier's phase for message m + 2 begins when the phase for message m completes. Blocks send
//   bytes of message m + 2 only after they have received message m + 1 from the owner of the
//   barrier, which sends it after it has waited for message m. Bytes may arrive before thread 0
//   sets the expected number: the count is then negative for a while, and the phase stays open
//   until thread 0 arrives.
// Why it cannot deadlock.
//   The blocks of a cluster run concurrently. Message 0 is sent without waiting, message m + 1 once
//   message m is complete.
// Begin and end
//   There is a cluster barrier before the first store, so that every barrier is initialised, and
//   another one after the last wait, so that no block exits while another one still stores into it.
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

// A warp sends the words of 16 units of two rows to every block. `word` is the lane's word for the
// unit and row of its Item; with two units per word, only that of even lanes. `quarter` selects two
// rows of the tile of 8 rows that begins at `first_row`. Shuffles assemble the words of a row into
// pieces of 16 bytes; the lanes divide all pairs of a piece and a block among themselves.
template <int unit_words, class Machine>
FASTRNN_ON_MACHINE void send_to_cluster(Machine& machine, int lane, int quarter, u32 word,
                                        int blocks, int rows, int first_row, u32* to, int stride,
                                        Barrier* barrier) {
  constexpr int kPieces = unit_words / 4;  // per row
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
  constexpr int kDealt = 2 * kPieces;  // lanes per block
  for (int block = lane / kDealt; block < blocks; block += kLanes / kDealt)
    machine.send(block, to + row * stride + 4 * piece, words, barrier);
}

}  // namespace fastrnn::persistent
