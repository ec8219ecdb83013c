// Runs a program: picks the kernels, sizes the blocks of steps and the team of threads, and lays
// the workspace out.
#include "../program.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "host.h"
#include "layer.h"
#include "program_plan.h"

namespace fastrnn {
namespace {

using Index = std::int64_t;

// A block of steps, and a chunk, have as many pairs as fit these bytes of cache, within limits.
constexpr Index kBlockBytes = 1 << 20, kLeastBlock = 256, kMostBlock = 4096;
constexpr Index kChunkBytes = 1 << 20, kLeastChunk = 128, kMostChunk = 512;

const ProgramKernels::Of& kernels_of(const Program& program) {
  for (const InstructionSet* set = &chosen_set();; set = set->base)
    if (set->programs) return set->programs->of[program.text().dtype == DType::f64 ? 1 : 0];
}

Index bytes_of(const Program& program) { return program.text().dtype == DType::f64 ? 8 : 4; }

// Bytes of a pair's values of one home.
Index pair_bytes(const Program& program, Home home) {
  Index width = 0;
  for (const ProgramValue& v : program.text().values)
    if (v.home == home) width += v.width;
  return width * bytes_of(program);
}

Index block_steps(const Program& program, Index T, Index B) {
  const ProgramText& text = program.text();
  const bool in_blocks =
      !text.phases[kBefore].empty() || !text.phases[kAfter].empty() || !text.sums.empty();
  if (!in_blocks || B == 0) return std::max<Index>(T, 1);
  const Index bytes = std::max<Index>(pair_bytes(program, Home::block), 1);
  const Index pairs = std::clamp(kBlockBytes / bytes, kLeastBlock, kMostBlock);
  return std::clamp<Index>(pairs / B, 1, std::max<Index>(T, 1));
}

Index chunk_pairs(const Program& program, Index pairs) {
  const Index bytes = std::max<Index>(pair_bytes(program, Home::local), 1);
  const Index fits = std::clamp(kChunkBytes / bytes, kLeastChunk, kMostChunk);
  return std::max<Index>(std::min(fits, pairs), 1);
}

// ---- how a team divides the work ----------------------------------------------------------------
//
// By estimate, from the costs of host.h.

class Estimate {
 public:
  Estimate(const Program& program, Index T, Index B)
      : program_(program),
        T_(static_cast<double>(T)),
        B_(static_cast<double>(B)),
        lanes_(kernels_of(program).lanes) {
    for (const PairSum& s : program.text().sums)
      sums_ += s.outer ? products(s.G, s.K, s.N) : static_cast<double>(s.N) / lanes_ / kClock;
  }

  // The whole call where the rows are divided among the threads, or the columns of a step.
  double by_rows(int threads) const {
    const double mine = std::ceil(B_ / threads);
    return T_ * phase(kStep, mine, 1) + others(mine / B_) + region(threads);
  }
  double by_columns(int threads) const {
    const auto barriers = static_cast<double>(program_.text().phases[kStep].size());
    return T_ * (phase(kStep, B_, threads) + barriers * kBarrier) + others(1.0 / threads) +
           region(threads);
  }

 private:
  static double region(int threads) { return threads > 1 ? kRegion : 0; }
  double products(Index G, Index K, Index N) const {
    return static_cast<double>(G) * static_cast<double>(K) * static_cast<double>(N) /
           (2 * kClock * lanes_);
  }
  double others(double part) const {
    return T_ * B_ * part * (phase(kBefore, 1, 1, true) + phase(kAfter, 1, 1, true) + sums_);
  }

  // One step of a phase: `rows` rows on one of `threads` threads that share the columns. `blocked`:
  // many rows at a time, so that reading the weights from memory does not count.
  double phase(int which, double rows, int threads, bool blocked = false) const {
    double time = 0;
    for (const Instruction& i : program_.text().phases[which]) {
      if (i.kind == Instruction::Kind::product) {
        const Product& p = i.product;
        const double block = rows * products(p.G, p.K, p.N) / threads;
        const double bytes = static_cast<double>(p.G * p.K * p.N * bytes_of(program_)) / threads;
        time += blocked ? block : std::max(block, bytes / (bytes <= kInnerBytes ? kInner : kOuter));
      } else if (i.kind == Instruction::Kind::run) {
        time += rows * static_cast<double>(i.run.width * i.run.count) * kPoint / lanes_ / threads;
      } else {
        const Index width =
            i.kind == Instruction::Kind::reduce ? i.reduce.G * i.reduce.n : i.collect.count;
        time += rows * static_cast<double>(width) / lanes_;
      }
    }
    return time;
  }

  static constexpr double kPoint = 2;  // nanoseconds of an operation on a vector, in the mean

  const Program& program_;
  const double T_, B_, lanes_;
  double sums_ = 0;  // of a pair
};

// When the cores are oversubscribed, columns are not split: each step would wait for the slowest
// thread.
ProgramTeam choose_team(const ProgramCall& call, bool oversubscribed) {
  ProgramTeam best;
  if (call.threads <= 1 || call.T == 0 || call.B == 0) return best;
  const Estimate estimate(*call.program, call.T, call.B);
  double least = kGain * estimate.by_rows(1);
  for (int threads = 2; threads <= call.threads; ++threads) {
    if (threads <= call.B && estimate.by_rows(threads) < least) {
      least = estimate.by_rows(threads);
      best = {threads, false};
    }
    if (!oversubscribed && estimate.by_columns(threads) / kGainOfUnits < least) {
      least = estimate.by_columns(threads) / kGainOfUnits;
      best = {threads, true};
    }
  }
  return best;
}

// ---- the plan -----------------------------------------------------------------------------------

template <class T>
ListOf<T> list_of(const std::vector<T>& items) {
  return {items.data(), static_cast<Index>(items.size())};
}

// The program as plain arrays, some of which it owns.
struct Planned {
  std::vector<CollectTable> tables;
  ProgramPlan plan;

  Planned(const ProgramCall& call, const ProgramTeam& team) {
    const Program& program = *call.program;
    const ProgramText& text = program.text();
    for (std::size_t i = 0; i < text.tables.size(); ++i)
      tables.push_back({list_of(program.pieces[i]), text.tables[i].starts.data(),
                        text.tables[i].indices.data()});
    plan.call = &call;
    plan.values = list_of(text.values);
    for (int phase = 0; phase < kPhases; ++phase) {
      plan.phases[phase] = list_of(text.phases[phase]);
      plan.used[phase] = list_of(program.used[phase]);
    }
    plan.points = list_of(text.points);
    plan.constants = list_of(text.constants);
    plan.tables = list_of(tables);
    plan.sums = list_of(text.sums);
    plan.states = list_of(program.states);
    plan.gaps = list_of(program.gaps);
    plan.gradients = static_cast<Index>(program.gradients.size());
    plan.before_first = program.before_first;
    plan.after_last = program.after_last;
    plan.block_steps = block_steps(program, call.T, call.B);
    plan.chunk = chunk_pairs(program, plan.block_steps * call.B);
    plan.threads = team.threads;
    plan.share_columns = team.columns;
  }
  Planned(const Planned&) = delete;
  Planned& operator=(const Planned&) = delete;
};

// Throws where the bytes of a run's workspace could overflow 64 bits.
void expect_countable(const ProgramPlan& plan) {
  const ProgramText& text = plan.call->program->text();
  double widths = 0, weights = 0;
  for (const ProgramValue& v : text.values) widths += static_cast<double>(v.width) + 64;
  for (const auto& phase : text.phases)
    for (const Instruction& i : phase)
      weights += static_cast<double>(i.product.G) * static_cast<double>(i.product.N + 256) *
                 static_cast<double>(i.product.K);
  const double B = static_cast<double>(plan.call->B);
  const double pairs = (static_cast<double>(plan.block_steps) + 2) * (B + 1) +
                       static_cast<double>(plan.chunk) * (plan.threads + 1);
  constexpr double most = 281474976710656;  // 2^48
  if ((widths * pairs + weights) * 8 > most) throw std::bad_alloc();
}

}  // namespace

// For whichever team a call may choose.
std::size_t program_workspace_size(const ProgramCall& call) {
  std::size_t most = 0;
  for (const bool oversubscribed : {false, true}) {
    const Planned planned(call, choose_team(call, oversubscribed));
    expect_countable(planned.plan);
    most = std::max(most, kernels_of(*call.program).scratch(planned.plan));
  }
  return most + sizeof(Barrier) + 64;
}

ProgramTeam program_team(const ProgramCall& call) { return choose_team(call, false); }

void run_program(const ProgramCall& call) {
  Planned planned(call, choose_team(call, cores_are_oversubscribed()));
  HostArena arena{static_cast<char*>(call.workspace)};
  auto* const at = static_cast<Barrier*>(arena.take(sizeof(Barrier)));
  const Barriers barriers(at, 1);
  planned.plan.barrier = at;
  const ProgramKernels::Of& kernels = kernels_of(*call.program);
  void* const scratch = static_cast<char*>(call.workspace) + arena.used;
  kernels.lay_out(planned.plan, scratch);
  run_threads(planned.plan.threads,
              [&](int thread, int threads) { kernels.run(scratch, thread, threads); });
}

}  // namespace fastrnn
