// The choice of the kernel, the number of teams and the size of a message, in plain arithmetic, so
// that it can be tested on a CPU.
//
// The estimated time of a step, in clocks, for a team of R rows (padded to 8) and a message of b
// bytes per row:
//   products   gates·16·tiles·K·R / rate, with K = H forward and gates·H (gates: 1) backward; the
//              rate in multiply-adds per multiprocessor and clock: 16-bit 1280, TF32 640, three
//              TF32 213
//   exchange   ring 600 + R·b / 34, cluster 240 + R·b / 16, block 60
//   sums       written to and read from shared memory at 128 bytes per clock
//   cell       200 for each item of a thread
//   passes     each pass after the first waits for its words again: ring 400, otherwise 60
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "backend.h"
#include "persistent/product.h"

namespace fastrnn::persistent {

// The type of the products: float32 uses one TF32 product if the user allows it, else three.
enum class OperandKind { bfloat16, float16, tf32, float32 };

// A compiled kernel.
struct Kernel {
  const char* cell;  // as in csrc/cells/list.h
  OperandKind operand;
  Pass pass;
  RuntimeConfig config;
  int gates, states;
  const void* function;
};

template <class Operand>
inline constexpr OperandKind kind_of = OperandKind::float32;
template <>
inline constexpr OperandKind kind_of<BFloat16> = OperandKind::bfloat16;
template <>
inline constexpr OperandKind kind_of<Float16> = OperandKind::float16;
template <>
inline constexpr OperandKind kind_of<Tf32> = OperandKind::tf32;

template <class C>
Kernel kernel_of(Pass pass, const void* function) {
  return {C::Cell::name,  kind_of<typename C::Operand>,
          pass,           runtime_config<C>(),
          C::Cell::gates, C::Cell::states,
          function};
}

struct Sizes {
  const char* cell = "LSTM";
  OperandKind operand = OperandKind::float32;
  Pass pass = Pass::forward;
  int T = 0, B = 0, H = 0, groups = 1;
};

// The properties of a device that the choice depends on.
struct DeviceFacts {
  int multiprocessors = 0;
  int shared_bytes = 0;  // the maximum per block
  int compute_major = 0;
  bool cooperative = false;
  int clusters_of_16 = 0, clusters_of_8 = 0;  // that run concurrently; zero: none
  std::size_t cache_bytes = 0;                // the size of the L2
};

// An H200, according to its data sheet. The number of concurrent clusters is an assumption: no
// kernel has run there.
inline DeviceFacts h200() {
  DeviceFacts d;
  d.multiprocessors = 132;
  d.shared_bytes = 227 << 10;
  d.compute_major = 9;
  d.cooperative = true;
  d.clusters_of_16 = 7;
  d.clusters_of_8 = 15;
  d.cache_bytes = std::size_t{50} << 20;
  return d;
}

struct Plan {
  const Kernel* kernel = nullptr;
  Team team;
  int blocks = 0;  // of the launch
  int shared_bytes = 0;
  std::size_t workspace_bytes = 0;  // 16-byte aligned; its content is ignored
  double clocks = 0;                // estimate for a step (docs/kernels-cuda-persistent.md)
  std::string why;                  // the kernel and its teams, or why there is none
};

inline int divide_up(int a, int b) { return (a + b - 1) / b; }

inline double step_clocks(const Kernel& k, const Team& team) {
  const RuntimeConfig& c = k.config;
  const int rows = divide_up(team.rows_per_team, kRows) * kRows,
            used = team.chunks * kChunk * c.per_word;
  const bool half = c.per_word == 2;
  const double rate = half ? 1280 : k.operand == OperandKind::tf32 ? 640 : 213;
  const double products = double(c.M) * kUnits * c.tiles * used * rows / rate;
  const double bytes = double(rows) * team.row_words * 4;
  const double exchange = c.via == Via::ring      ? 600 + bytes / 34
                          : c.via == Via::cluster ? 240 + bytes / 16
                                                  : 60;
  const double sums =
      c.slices() > 1 ? 2.0 * kWarps * c.M * kFragment * 4 * (rows / kRows) / 128 : 0;
  const double cell = 200.0 * c.items() * team.passes;
  const double passes = (team.passes - 1) * (c.via == Via::ring ? 400.0 : 60.0);
  return products + exchange + sums + cell + passes;
}

inline const char* name_of(Via via) {
  return via == Via::ring ? "ring" : via == Via::cluster ? "cluster" : "block";
}

inline const char* name_of(OperandKind operand) {
  switch (operand) {
    case OperandKind::bfloat16:
      return "bfloat16";
    case OperandKind::float16:
      return "float16";
    case OperandKind::tf32:
      return "TF32";
    case OperandKind::float32:
      break;
  }
  return "3xTF32";
}

// The blocks of a team, or 0 with the reason in `why`.
inline int blocks_of_team(const Kernel& k, const Sizes& s, const DeviceFacts& d, std::string* why) {
  const int needed = divide_up(s.H, kUnits * k.config.tiles);
  if (k.config.via == Via::block) {
    if (needed > 1) *why = "more units than a block has";
    return needed > 1 ? 0 : 1;
  }
  if (k.config.via == Via::ring) {
    if (!d.cooperative)
      *why = "the device has no cooperative launches";
    else if (needed * s.groups > d.multiprocessors)
      *why = "more blocks than multiprocessors";
    return why->empty() ? needed : 0;
  }
  int blocks = 2;
  while (blocks < needed) blocks *= 2;
  if (d.compute_major < 9)
    *why = "the device has no clusters";
  else if (!d.clusters_of_8)
    *why = "the device runs no clusters of this build's kernels";
  else if (blocks > 16 || (blocks == 16 && !d.clusters_of_16))
    *why = "more blocks than a cluster has";
  return why->empty() ? blocks : 0;
}

// The number of teams that run concurrently.
inline int teams_at_once(const Kernel& k, int blocks, const DeviceFacts& d) {
  if (k.config.via == Via::cluster) {
    if (blocks == 16) return d.clusters_of_16;
    return d.clusters_of_8 * (8 / blocks);
  }
  return d.multiprocessors / blocks;
}

// The team's sizes for this number of rows.
inline Team team_of(const Kernel& k, const Sizes& s, int blocks, int rows) {
  const int fields = k.pass == Pass::forward ? 1 : k.gates;
  Team team;
  team.rows_total = s.B;
  team.rows_per_team = rows;
  team.teams_per_group = divide_up(s.B, rows);
  team.blocks = blocks;
  team.units = s.H;
  team.row_words = fields * blocks * k.config.tiles * k.config.unit_words();
  const int used = fields > 1 ? team.row_words : divide_up(s.H, k.config.per_word);
  team.chunks = divide_up(used, kChunk);  // of one field the padding at the end is left out
  team.stride = kChunk * (divide_up(team.row_words, kChunk) | 1);
  team.passes = divide_up(divide_up(rows, kRows), k.config.batch);
  return team;
}

inline std::int64_t message_bytes(const Team& team) {
  return std::int64_t(team.rows_per_team) * team.row_words * 4;
}

// The plan with this kernel for the case, or a plan without a kernel and with the reason.
inline Plan plan_for(const Kernel& k, const Sizes& s, const DeviceFacts& d) {
  Plan plan;
  const int blocks = blocks_of_team(k, s, d, &plan.why);
  if (!blocks) return plan;
  int teams = teams_at_once(k, blocks, d) / s.groups;
  if (teams < 1) teams = 1;  // clusters and blocks queue; a ring was checked to fit
  int rows = divide_up(divide_up(s.B, teams), kRows) * kRows;
  plan.team = team_of(k, s, blocks, rows);
  if (plan.team.chunks > k.config.chunks() * k.config.slices()) {
    plan.why = "more weights than a block keeps";
    return plan;
  }
  // Where the rows of a team do not fit in shared memory, more teams with fewer rows queue.
  while ((plan.shared_bytes = shared_layout(k.config, plan.team, k.states).bytes) >
         d.shared_bytes) {
    if (rows == kRows || k.config.via == Via::ring) {
      plan.why = "more shared memory than a block has";
      return plan;
    }
    rows -= kRows;
    plan.team = team_of(k, s, blocks, rows);
  }
  const int all = s.groups * plan.team.teams_per_group;
  if (k.config.via == Via::ring) {
    plan.team.period = 8;
    const std::int64_t most = std::int64_t(d.cache_bytes / 4);
    while (plan.team.period > 1 &&
           all * kEpochs * plan.team.period * message_bytes(plan.team) > most)
      plan.team.period /= 2;
    plan.workspace_bytes =
        std::size_t(all) * kEpochs * plan.team.period * std::size_t(message_bytes(plan.team));
  }
  plan.kernel = &k;
  plan.blocks = all * blocks;
  const int waves =
      divide_up(all, teams_at_once(k, blocks, d) > 0 ? teams_at_once(k, blocks, d) : 1);
  plan.clocks = step_clocks(k, plan.team) * waves;
  plan.why = std::string(name_of(k.config.via)) + ", " + name_of(k.operand) + ", " +
             std::to_string(all) + " team" + (all == 1 ? "" : "s") + " of " +
             std::to_string(blocks) + " block" + (blocks == 1 ? "" : "s") + ", " +
             std::to_string(plan.team.rows_per_team) + " rows each";
  return plan;
}

// The kernel with the least estimated time of those that fit.
inline Plan choose_kernel(const Sizes& s, const DeviceFacts& d, const Kernel* kernels, int count) {
  Plan best;
  best.why = "no persistent kernel of this cell and type";
  if (s.T < 1 || s.B < 1 || s.H < 1 || s.groups < 1) {
    best.why = "an empty problem";
    return best;
  }
  for (int i = 0; i < count; ++i) {
    const Kernel& k = kernels[i];
    if (std::string(k.cell) != s.cell || k.operand != s.operand || k.pass != s.pass) continue;
    Plan plan = plan_for(k, s, d);
    const bool better = plan.kernel && (!best.kernel || plan.clocks < best.clocks);
    if (better || !best.kernel) best = plan;
  }
  return best;
}

}  // namespace fastrnn::persistent
