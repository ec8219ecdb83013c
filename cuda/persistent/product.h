// One step's product of a persistent kernel: the state of a few rows of the batch, times the
// weights that a block keeps for the whole sequence. Forward multiplies h by the rows of W_hh for
// the gates of the block's units; backward multiplies the gates' gradients by the columns of W_hh.
//
// Maths        sums[m][unit][row] = Σ_k A[m][unit][k] · B[k][row]
//                forward   m: the gates, K = H:    A = W_hh[m·H + unit][k],  B = h[row][k]
//                backward  m: one,  K = gates·H:   A = W_hh[k][unit],        B = d_gates[row][k]
// Teams        the rows of the batch are independent, so blocks form teams, each with all of the
//              weights and its own rows. A team's blocks divide the hidden units: block `rank` has
//              the units from rank·tiles·16 on. Each group (direction, head) has its own teams.
// A block      8 warps: `tiles` tiles of 16 units × `slices` slices of K (tiles · slices = 8).
//              Slice i takes chunks i, i + slices, … A warp keeps its part of A as fragments, in
//              registers (`registers` chunks) and the rest in shared memory (`shared` chunks), so a
//              step reads no weights from other memory.
// Messages     B is received as words [row][row_words], row_words = fields · blocks · tiles · 16 /
//              per_word, with field f, unit u at f·unit_words + u / per_word. Forward has one
//              field, backward one for each gate. All units up to the padding are sent; units
//              beyond H are zeros.
//                ring     through L2 (ring.h): the words that a lane polls are its operand
//                cluster  into the shared memory of every block of the cluster (cluster.h)
//                block    a team of one block: its own shared memory, and the block's barrier
// A pass       processes `batch` tiles of 8 rows. The sums over the slices are added in shared
//              memory, slice by slice, in an order that depends only on H. Two buffers alternate,
//              so one barrier per pass suffices: before a thread overwrites a buffer, it passes the
//              barrier after the last read of that buffer.
// Any size     rows beyond the batch, units beyond H and words beyond K are zeros; no thread waits
//              for them or stores them.
//
// Registers of a lane: registers·M·8 for weights, batch·M·4 for sums, 32 for words in flight.
#pragma once

#include <type_traits>
#include <utility>

#include "persistent/cluster.h"
#include "persistent/ring.h"
#include "persistent/words.h"

namespace fastrnn::persistent {

enum class Via { ring, cluster, block };

// The compile-time configuration of a kernel. M: tiles of A per warp.
template <class Cell_, class Operand_, Via via_, int M_, int tiles_, int registers_, int shared_,
          int batch_>
struct Config {
  using Cell = Cell_;
  using Operand = Operand_;
  static constexpr Via via = via_;
  static constexpr int M = M_, tiles = tiles_, registers = registers_, shared = shared_;
  static constexpr int batch = batch_;
  static constexpr int slices = kWarps / tiles;
  static constexpr int chunks = registers + shared;              // the maximum per warp
  static constexpr int unit_words = kUnits / Operand::per_word;  // of a tile
  static constexpr int fragments = batch * tiles;                // of a pass, for each m
  static constexpr int items = (fragments * kFragment + kThreads - 1) / kThreads;  // of a thread
  static_assert(tiles * slices == kWarps && registers > 0 && batch > 0);
  static_assert(via != Via::ring || slices > 1, "the ring needs the barrier of each pass");
  static_assert(via != Via::cluster || slices > 1, "a warp sends the sums that it has read");
};

// A configuration as the launcher reads it.
struct RuntimeConfig {
  Via via;
  int per_word, M, tiles, registers, shared, batch;

  FASTRNN_HOST_DEVICE int slices() const { return kWarps / tiles; }
  FASTRNN_HOST_DEVICE int chunks() const { return registers + shared; }  // of a warp, at most
  FASTRNN_HOST_DEVICE int unit_words() const { return kUnits / per_word; }
  FASTRNN_HOST_DEVICE int items() const {
    return (batch * tiles * kFragment + kThreads - 1) / kThreads;
  }
};

template <class C>
FASTRNN_HOST_DEVICE RuntimeConfig runtime_config() {
  return {C::via, C::Operand::per_word, C::M, C::tiles, C::registers, C::shared, C::batch};
}

// The sizes of a launch, the same for every team.
struct Team {
  int rows_total = 0;     // B
  int rows_per_team = 0;  // a multiple of 8
  int teams_per_group = 1;
  int blocks = 1;     // per team
  int units = 0;      // H
  int chunks = 0;     // of K, over all slices
  int row_words = 0;  // of a message
  int stride = 0;     // of a row in shared memory: 16 · an odd number
  int passes = 1;
  u32* ring_words = nullptr;  // [teams][4·period][rows_per_team][row_words]
  int period = 1;
};

template <class C>
FASTRNN_HOST_DEVICE int words_per_field(const Team& team) {
  return team.blocks * C::tiles * C::unit_words;
}

// The position of a thread in the launch.
struct Position {
  int team, group, rank, first_row, rows, warp, lane, tile, slice, thread;
};

template <class C, class Machine>
FASTRNN_ON_MACHINE Position position_of(const Machine& machine, const Team& team) {
  Position me{};
  me.thread = machine.thread();
  me.team = machine.block() / team.blocks;
  me.rank = machine.block() % team.blocks;
  me.group = me.team / team.teams_per_group;
  me.first_row = me.team % team.teams_per_group * team.rows_per_team;
  const int left = team.rows_total - me.first_row;
  me.rows = left < team.rows_per_team ? left : team.rows_per_team;
  me.warp = me.thread / kLanes;
  me.lane = me.thread % kLanes;
  me.tile = me.warp % C::tiles;
  me.slice = me.warp / C::tiles;
  return me;
}

// The same position, such that the compiler recomputes addresses at each step instead of keeping
// them in registers.
template <class Machine>
FASTRNN_ON_MACHINE Position made_anew(Machine& machine, const Position& me) {
  Position now = me;
  now.thread = machine.opaque(me.thread);
  now.rank = machine.opaque(me.rank);
  now.group = machine.opaque(me.group);
  now.first_row = machine.opaque(me.first_row);
  now.lane = now.thread % kLanes;
  now.warp = now.thread / kLanes;
  return now;
}

template <class C>
FASTRNN_HOST_DEVICE Ring ring_of(const Team& team, const Position& me) {
  Ring ring;
  ring.period = team.period;
  ring.message_words = static_cast<std::int64_t>(team.rows_per_team) * team.row_words;
  ring.words = team.ring_words + me.team * (kEpochs * team.period) * ring.message_words;
  return ring;
}

// The item-th (unit, row) of a thread within a pass.
struct Item {
  bool exists;
  int n;     // tile of rows
  int tile;  // tile of units
  int row;   // of the team
  int unit;  // of the group, up to the padding
  int at;    // in the fragment's layout in shared memory
};

template <class C>
FASTRNN_HOST_DEVICE Item item_of(int item, int pass, const Position& me) {
  Item x{};
  int row, unit;
  if constexpr (C::slices == 1) {  // the items of the thread's own sums
    x.exists = true;
    x.n = item / 4;
    x.tile = me.tile;
    row = row_of_sum(me.lane, item % 4);
    unit = unit_of_sum(me.lane, item % 4);
  } else {
    const int flat = item * kThreads + me.thread;
    const int fragment = flat / kFragment;
    x.exists = fragment < C::fragments;
    x.n = fragment / C::tiles;
    x.tile = fragment % C::tiles;
    x.at = flat % kFragment;
    row = row_at(x.at);
    unit = unit_at(x.at);
  }
  x.row = (pass * C::batch + x.n) * kRows + row;
  x.unit = (me.rank * C::tiles + x.tile) * kUnits + unit;
  return x;
}

// ---- shared memory ----------------------------------------------------------------------------

// Bytes from the start of the block's shared memory, each a multiple of 16.
struct SharedLayout {
  int weights = 0;   // [shared][M][2][thread] Words
  int sums = 0;      // [2][warp][batch][M][lane] Sums
  int states = 0;    // [state][pass][item][thread] floats
  int messages = 0;  // [2][rows_per_team][stride] words
  int barriers = 0;  // [2] of 8 bytes
  int bytes = 0;
};

FASTRNN_HOST_DEVICE SharedLayout shared_layout(const RuntimeConfig& c, const Team& team,
                                               int states) {
  SharedLayout at;
  at.sums = c.shared * c.M * 2 * kThreads * 16;
  at.states = at.sums + (c.slices() > 1 ? 2 * kWarps * c.batch * c.M * kLanes * 16 : 0);
  at.messages = at.states + states * team.passes * c.items() * kThreads * 4;
  at.barriers = at.messages + (c.via == Via::ring ? 0 : 2 * team.rows_per_team * team.stride * 4);
  at.bytes = at.barriers + 16;
  return at;
}

// ---- weights ----------------------------------------------------------------------------------

// W_hh of one group, row-major [gates·H][H]. `aligned`: the rows and the address are aligned to 16
// bytes.
template <class Operand>
struct Matrix {
  const Storage<Operand>* data;
  int units;
  bool aligned;

  FASTRNN_HOST_DEVICE float at(int gate, int unit, int k) const {
    if (unit >= units || k >= units) return 0.0f;
    return Operand::load(data[(static_cast<std::int64_t>(gate) * units + unit) * units + k]);
  }
};

template <class Operand>
FASTRNN_HOST_DEVICE Words words_from(const float (&values)[4 * Operand::per_word]) {
  Words words;
  FASTRNN_UNROLL
  for (int i = 0; i < 4; ++i)
    words.v[i] = word_of<Operand>(values[i * Operand::per_word],
                                  values[i * Operand::per_word + Operand::per_word - 1]);
  return words;
}

// Rows of W_hh: gate m of the unit, K along the units of the previous step.
template <class Operand>
struct ForwardWeights {
  Matrix<Operand> matrix;

  FASTRNN_HOST_DEVICE Words words(int m, int unit, int word) const {
    constexpr int kValues = 4 * Operand::per_word;
    const int k = word * Operand::per_word;
    if (matrix.aligned && unit < matrix.units && k + kValues <= matrix.units) {
      const std::int64_t row = static_cast<std::int64_t>(m) * matrix.units + unit;
      const Words raw = *reinterpret_cast<const Words*>(matrix.data + row * matrix.units + k);
      if constexpr (Operand::per_word == 2) return raw;
      const float values[4] = {float_of(raw.v[0]), float_of(raw.v[1]), float_of(raw.v[2]),
                               float_of(raw.v[3])};
      return words_of_floats(values);
    }
    float values[kValues];
    FASTRNN_UNROLL
    for (int i = 0; i < kValues; ++i) values[i] = matrix.at(m, unit, k + i);
    return words_from<Operand>(values);
  }

  static FASTRNN_HOST_DEVICE Words words_of_floats(const float (&values)[4]) {
    Words words;
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) words.v[i] = word_of<Operand>(values[i], 0.0f);
    return words;
  }
};

// Columns of W_hh: K along the gates' gradients, field by field.
template <class Operand>
struct BackwardWeights {
  Matrix<Operand> matrix;
  int fields, words_per_field;

  FASTRNN_HOST_DEVICE Words words(int, int unit, int word) const {
    float values[4 * Operand::per_word];
    FASTRNN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int field = (word + i) / words_per_field;
      const int from = (word + i) % words_per_field * Operand::per_word;
      FASTRNN_UNROLL
      for (int j = 0; j < Operand::per_word; ++j)
        values[i * Operand::per_word + j] =
            field < fields ? matrix.at(field, from + j, unit) : 0.0f;
    }
    return words_from<Operand>(values);
  }
};

// The part of A that a warp keeps: [chunk][m][product][a0 … a3].
template <class C>
struct Weights {
  Words kept[C::registers][C::M][2];
  const Words* more;  // this thread's: more[((chunk·M + m)·2 + product)·kThreads]

  template <int chunk>
  FASTRNN_HOST_DEVICE Words fragment(int m, int product) const {
    if constexpr (chunk < C::registers)
      return kept[chunk][m][product];
    else
      return more[(((chunk - C::registers) * C::M + m) * 2 + product) * kThreads];
  }
};

// Loads one chunk after another: the barrier prevents the compiler from issuing all loads at once,
// which would use the registers that are needed for the weights.
template <class C, class Machine, class Source>
FASTRNN_ON_MACHINE void load_weights(Machine& machine, const Source& source, const Position& me,
                                     Words* shared, Weights<C>& weights) {
  const int unit = (me.rank * C::tiles + me.tile) * kUnits + 2 * group_of(me.lane);
  weights.more = shared + me.thread;
  FASTRNN_UNROLL
  for (int chunk = 0; chunk < C::chunks; ++chunk) {
    machine.sync();
    const int word = (chunk * C::slices + me.slice) * kChunk + 4 * member_of(me.lane);
    FASTRNN_UNROLL
    for (int m = 0; m < C::M; ++m) {
      const Words low = source.words(m, unit, word), high = source.words(m, unit + 1, word);
      FASTRNN_UNROLL
      for (int q = 0; q < 2; ++q) {
        const Words a{{low.v[2 * q], high.v[2 * q], low.v[2 * q + 1], high.v[2 * q + 1]}};
        if (chunk < C::registers)
          weights.kept[chunk < C::registers ? chunk : 0][m][q] = a;
        else
          shared[(((chunk - C::registers) * C::M + m) * 2 + q) * kThreads + me.thread] = a;
      }
    }
  }
}

// ---- the product ------------------------------------------------------------------------------

template <class C>
using Accumulators = float[C::batch][C::M][4];

template <class C, int chunk, class Machine>
FASTRNN_ON_MACHINE void multiply(Machine& machine, const Weights<C>& weights, const Words& b,
                                 float (&sums)[C::M][4]) {
  FASTRNN_UNROLL
  for (int q = 0; q < 2; ++q) {
    FASTRNN_UNROLL
    for (int m = 0; m < C::M; ++m)
      machine.multiply(typename C::Operand{}, sums[m], weights.template fragment<chunk>(m, q),
                       b.v[2 * q], b.v[2 * q + 1]);
  }
}

// Calls f(std::integral_constant) for 0 … N − 1, unrolled on every compiler.
template <int N, int i = 0, class F>
FASTRNN_ON_MACHINE void each(F&& f) {
  if constexpr (i < N) {
    f(std::integral_constant<int, i>{});
    each<N, i + 1>(f);
  }
}

// From the ring. A lane loads `kWindow` pieces of 16 bytes at a time, and issues the next loads
// before it waits for the current ones; while it waits it repeats the loads of missing pieces.
template <class C, class Machine>
FASTRNN_ON_MACHINE void sum_from_ring(Machine& machine, const Team& team, const Position& me,
                                      const Weights<C>& weights, const Ring& ring, int message,
                                      int pass, const bool (&drop)[C::batch],
                                      Accumulators<C>& sums) {
  constexpr int kWindow = 4, kLoads = C::chunks * C::batch;
  constexpr int kGroups = (kLoads + kWindow - 1) / kWindow;
  const u32* const words = ring.slot(message) + 4 * member_of(me.lane);
  const int row = pass * C::batch * kRows + group_of(me.lane);
  Words now[kWindow], next[kWindow];

  const auto address = [&](int load) {
    const int chunk = load / C::batch * C::slices + me.slice;
    const std::int64_t at = row + load % C::batch * kRows;
    return words + at * team.row_words + chunk * kChunk;
  };
  const auto wanted = [&](int load) {
    const int chunk = load / C::batch * C::slices + me.slice;
    return load < kLoads && chunk < team.chunks &&
           chunk * kChunk + 4 * member_of(me.lane) < team.row_words &&
           row + load % C::batch * kRows < me.rows;
  };
  const auto ask = [&](int group, Words(&into)[kWindow]) {
    FASTRNN_UNROLL
    for (int k = 0; k < kWindow; ++k) {
      into[k] = Words{{0, 0, 0, 0}};
      if (wanted(group * kWindow + k)) into[k] = machine.load(address(group * kWindow + k));
    }
  };
  const auto wait = [&](int group) {
    for (;;) {
      bool all = true;
      FASTRNN_UNROLL
      for (int k = 0; k < kWindow; ++k) all = all && arrived(now[k]);
      if (all) break;
      machine.waiting();
      FASTRNN_UNROLL
      for (int k = 0; k < kWindow; ++k)
        if (!arrived(now[k])) now[k] = machine.load(address(group * kWindow + k));
    }
    machine.converge();
  };

  ask(0, now);
  each<kGroups>([&](auto group_constant) {
    constexpr int group = decltype(group_constant)::value;
    if constexpr (group + 1 < kGroups) ask(group + 1, next);
    wait(group);
    each<kWindow>([&](auto k_constant) {
      constexpr int k = decltype(k_constant)::value;
      constexpr int load = decltype(group_constant)::value * kWindow + k, chunk = load / C::batch,
                    n = load % C::batch;
      if constexpr (load < kLoads) {
        if (chunk * C::slices + me.slice < team.chunks) {
          const Words b = drop[n] ? Words{{0, 0, 0, 0}} : now[k];
          multiply<C, chunk>(machine, weights, b, sums[n]);
        }
      }
    });
    FASTRNN_UNROLL
    for (int k = 0; k < kWindow; ++k) now[k] = next[k];
  });
}

// From a message in the block's own shared memory.
template <class C, class Machine>
FASTRNN_ON_MACHINE void sum_from_shared(Machine& machine, const Team& team, const Position& me,
                                        const Weights<C>& weights, const u32* words, int pass,
                                        const bool (&drop)[C::batch], Accumulators<C>& sums) {
  const int row = pass * C::batch * kRows + group_of(me.lane);
  each<C::chunks>([&](auto chunk_constant) {
    constexpr int chunk = decltype(chunk_constant)::value;
    const int place = chunk * C::slices + me.slice;
    if (place >= team.chunks) return;
    each<C::batch>([&](auto n_constant) {
      constexpr int n = decltype(n_constant)::value;
      const int at = row + n * kRows;
      Words b{{0, 0, 0, 0}};
      if (at < me.rows && !drop[n])
        b = *reinterpret_cast<const Words*>(words + at * team.stride + place * kChunk +
                                            4 * member_of(me.lane));
      multiply<C, decltype(chunk_constant)::value>(machine, weights, b, sums[n]);
    });
  });
}

// The sums of a thread's items, over all slices: totals[item][m]. `turn` counts the passes.
template <class C, class Machine>
FASTRNN_ON_MACHINE void total(Machine& machine, const Position& me, unsigned turn, Sums* shared,
                              const Accumulators<C>& sums, float (&totals)[C::items][C::M]) {
  if constexpr (C::slices == 1) {
    FASTRNN_UNROLL
    for (int n = 0; n < C::batch; ++n) {
      FASTRNN_UNROLL
      for (int m = 0; m < C::M; ++m) {
        const Sums ordered = in_order(sums[n][m]);
        FASTRNN_UNROLL
        for (int j = 0; j < 4; ++j) totals[n * 4 + j][m] = ordered.v[j];
      }
    }
  } else {
    constexpr int kTiles = C::batch * C::M;  // of a warp
    Sums* const buffer = shared + (turn & 1) * kWarps * kTiles * kLanes;
    FASTRNN_UNROLL
    for (int n = 0; n < C::batch; ++n) {
      FASTRNN_UNROLL
      for (int m = 0; m < C::M; ++m)
        buffer[(me.warp * kTiles + n * C::M + m) * kLanes + place_of_lane(me.lane)] =
            in_order(sums[n][m]);
    }
    machine.sync();
    const float* const values = reinterpret_cast<const float*>(buffer);
    FASTRNN_UNROLL
    for (int i = 0; i < C::items; ++i) {
      const Item x = item_of<C>(i, 0, me);
      FASTRNN_UNROLL
      for (int m = 0; m < C::M; ++m) {
        float all = 0.0f;
        if (x.exists) {
          FASTRNN_UNROLL
          for (int slice = 0; slice < C::slices; ++slice) {
            const int warp = slice * C::tiles + x.tile;
            all += values[(warp * kTiles + x.n * C::M + m) * kFragment + x.at];
          }
        }
        totals[i][m] = all;
      }
    }
  }
}

// ---- sending ----------------------------------------------------------------------------------

// Sends the values of a thread's items of a pass as words of a message: values[item][field].
template <class C, int fields, class Machine>
FASTRNN_ON_MACHINE void send(Machine& machine, const Team& team, const Position& me,
                             const Ring& ring, u32* messages, Barrier* barriers, int message,
                             int pass, const float (&values)[C::items][fields]) {
  using Operand = typename C::Operand;
  constexpr int kPer = Operand::per_word;
  if constexpr (C::via == Via::ring) begin_message(machine, ring, message);
  u32* const buffer = messages + (message & 1) * team.rows_per_team * team.stride;
  FASTRNN_UNROLL
  for (int i = 0; i < C::items; ++i) {
    const Item x = item_of<C>(i, pass, me);
    const bool valid = x.exists && x.row < me.rows;
    FASTRNN_UNROLL
    for (int f = 0; f < fields; ++f) {
      const int at = f * words_per_field<C>(team) + x.unit / kPer;
      if constexpr (C::slices == 1) {  // one thread has both neighbours
        if (valid && i % kPer == 0)
          buffer[x.row * team.stride + at] =
              word_of<Operand>(values[i][f], values[i / kPer * kPer + kPer - 1][f]);
      } else {
        const float other = kPer == 2 ? machine.shuffle_xor(values[i][f], 1) : 0.0f;
        const u32 word = word_of<Operand>(values[i][f], other);  // valid in even lanes if kPer is 2
        if constexpr (C::via == Via::ring) {
          if (valid && me.lane % kPer == 0)
            publish(machine, ring, message, static_cast<std::int64_t>(x.row) * team.row_words + at,
                    word);
        } else if constexpr (C::via == Via::block) {
          if (valid && me.lane % kPer == 0) buffer[x.row * team.stride + at] = word;
        } else {
          send_to_cluster<C::unit_words>(
              machine, me.lane, me.warp % 4, word, team.blocks, x.exists ? me.rows : 0,
              x.row / kRows * kRows,
              buffer + f * words_per_field<C>(team) + (me.rank * C::tiles + x.tile) * C::unit_words,
              team.stride, barriers + (message & 1));
        }
      }
    }
  }
}

}  // namespace fastrnn::persistent
