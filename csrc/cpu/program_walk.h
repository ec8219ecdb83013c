// A program over a sequence: blocks of steps, each through its phases (csrc/program.h).
//
// Chunks      A phase runs over its pairs in chunks, all instructions on one chunk, then on the
//             next, so that local values stay in the cache.
// State       Two copies of each, written in turn; the first step reads the caller's, the last one
//             writes the caller's.
// Threads     Each has rows of its own, with barriers around the pair sums alone; or, where rows
//             are few, all share the columns of each instruction of a step, with a barrier after
//             it, and divide the pairs of the other phases. Where a step's barrier takes long, the
//             first thread runs a solo phase (threads.h).
#pragma once

#include "program_points.h"
#include "program_sums.h"

namespace fastrnn::FASTRNN_ISA {

template <class C>
class Walk {
  using V = Vec<C>;
  using Sums = SumScratch<C>;
  static constexpr int lanes = V::lanes;

  // The weights of a product in this call.
  struct ProductWeights {
    C* packed;
    Reading reading;
  };

  // One thread's scratch.
  struct Mine {
    Place<C>* places;  // [values]: of the current chunk
    C* locals;
    const C **in, **init;  // [chunk]
    C** out;
    PointScratch<C> points;
    Sums sums;
  };

 public:
  // Laid out once for all threads, each of which then runs a copy. A null base only counts bytes.
  Walk(const ProgramPlan& plan, void* base)
      : plan_(&plan), call_(plan.call), T_(call_->T), B_(call_->B) {
    Arena arena(base);
    constants_ = arena.take<C>(plan.constants.count * lanes);
    weights_ =
        arena.take<ProductWeights>(products_in(kBefore) + products_in(kStep) + products_in(kAfter));
    blocks_ = arena.take<C*>(plan.values.count);
    local_offsets_ = arena.take<Index>(plan.values.count);
    states_ = arena.take<C*>(plan.states.count);
    lay_out_values(arena);
    lay_out_products(arena);
    lay_out_threads(arena);
    used_ = arena.used();
  }

  std::size_t used() const { return used_; }

  void run(int thread, int threads) {
    const FlushSubnormals guard;
    thread_ = thread;
    threads_ = threads;
    mine_ = threads_of_ + thread;
    columns_ = plan_->share_columns && threads == plan_->threads && threads > 1;
    rows_ = columns_ ? Range{0, B_} : split(B_, thread, threads);
    prepare();
    meet(Barrier::Wait::start);
    for (Index s = 0; s < T_ && B_ > 0; s += plan_->block_steps)
      block_of_steps(s, least(s + plan_->block_steps, T_));
    if (T_ == 0) keep_states();
  }

 private:
  // ---- memory -----------------------------------------------------------------------------------

  // body(product, its number, phase)
  template <class Body>
  void each_product(Body body) const {
    Index number = 0;
    for (int phase = 0; phase < kPhases; ++phase)
      for (Index i = 0; i < plan_->phases[phase].count; ++i) {
        const Instruction& instruction = plan_->phases[phase].data[i];
        if (instruction.kind == Instruction::Kind::product)
          body(instruction.product, number++, phase);
      }
  }

  void lay_out_values(Arena& arena) {
    for (Index v = 0; v < plan_->values.count; ++v) {
      const ProgramValue& value = plan_->values.data[v];
      if (value.home == Home::block) {
        C* const at = arena.take<C>(plan_->block_steps * B_ * value.width);
        if (blocks_) blocks_[v] = at;
      }
      if (value.home == Home::local) {
        if (local_offsets_) local_offsets_[v] = local_width_;
        local_width_ += ceil_div(value.width, lanes) * lanes;
      }
      // The caller's states may be absent.
      const bool may_be_absent =
          value.home == Home::carry || value.home == Home::next || value.home == Home::sequence;
      if (may_be_absent && value.width > zero_count_) zero_count_ = value.width;
    }
    for (Index k = 0; k < plan_->states.count; ++k) {
      C* const at = arena.take<C>(2 * B_ * plan_->states.data[k]);
      if (states_) states_[k] = at;
    }
    zeros_ = arena.take<C>(zero_count_);
    team_locals_ = plan_->share_columns ? arena.take<C>(plan_->chunk * local_width_) : nullptr;
  }

  void lay_out_products(Arena& arena) {
    each_product([&](const Product& p, Index number, int phase) {
      const Index uses = phase == kStep ? T_ : 1, rows = phase == kStep ? B_ : T_ * B_;
      const ProductWeights made{arena.take<C>(Weights<C>{p}.size()),
                                choose_reading<C>(p, uses, rows)};
      if (weights_) weights_[number] = made;
    });
  }

  void lay_out_threads(Arena& arena) {
    Index operations = 0, scalars = 0, lines = 0;
    for (const auto& phase : plan_->phases)
      for (Index i = 0; i < phase.count; ++i) {
        if (phase.data[i].kind != Instruction::Kind::run) continue;
        const PointwiseRun& run = phase.data[i].run;
        operations = most(operations, run.count);
        scalars = most(scalars, count_scalars(run));
      }
    for (Index i = 0; i < plan_->sums.count; ++i) {
      const PairSum& sum = plan_->sums.data[i];
      if (sum.outer) lines = most(lines, SumMatrix(sum).lines);
    }
    threads_of_ = arena.take<Mine>(plan_->threads);
    for (int t = 0; t < plan_->threads; ++t) {
      Mine mine;
      mine.places = arena.take<Place<C>>(plan_->values.count);
      mine.locals = arena.take<C>(plan_->chunk * local_width_);
      mine.in = arena.take<const C*>(plan_->chunk);
      mine.init = arena.take<const C*>(plan_->chunk);
      mine.out = arena.take<C*>(plan_->chunk);
      mine.points = PointScratch<C>(arena, operations, scalars);
      if (plan_->sums.count > 0) mine.sums = Sums(arena, lines);
      if (threads_of_) threads_of_[t] = mine;
    }
  }
  Index count_scalars(const PointwiseRun& run) const {
    Index count = 0;
    for (Index i = 0; i < run.count; ++i)
      for (const PointOperand& from : plan_->points.data[run.first + i].from)
        count += from.kind == PointOperand::Kind::scalar ? 1 : 0;
    return count;
  }

  // ---- before the first step --------------------------------------------------------------------

  bool meet(Barrier::Wait kind) { return threads_ > 1 && plan_->barrier->wait(threads_, kind); }

  void prepare() {
    if (thread_ == 0) {
      for (Index i = 0; i < plan_->constants.count; ++i)
        V(static_cast<C>(plan_->constants.data[i])).store(constants_ + i * lanes);
      for (Index i = 0; i < zero_count_; ++i) zeros_[i] = C(0);
    }
    if (T_ == 0 || B_ == 0) {
      for (Index g = 0; g < plan_->gradients; ++g) clear_gradient({static_cast<int>(g), 0, -1});
      return;
    }
    for (Index i = 0; i < plan_->gaps.count; ++i) clear_gradient(plan_->gaps.data[i]);
    each_product([&](const Product& p, Index number, int) {
      const Weights<C> weights = weights_of(p, number);
      const Range here = split(weights.items(), thread_, threads_);
      for (Index item = here.begin; item < here.end; ++item) weights.pack(item);
    });
  }

  Weights<C> weights_of(const Product& p, Index number) const {
    const ProductWeights& made = weights_[number];
    return {p, shared(p.weight.value) + p.weight.offset, made.packed, made.reading};
  }

  void clear_gradient(const Gap& gap) const {
    const Index end = gap.end < 0 ? call_->gradient_sizes[gap.target] : gap.end;
    const Range here = split(end - gap.begin, thread_, threads_);
    if (here.begin < here.end)
      __builtin_memset(static_cast<C*>(call_->gradients[gap.target]) + gap.begin + here.begin, 0,
                       static_cast<std::size_t>(here.end - here.begin) * sizeof(C));
  }

  const C* shared(int value) const {
    return static_cast<const C*>(call_->shared[plan_->values.data[value].index]);
  }

  void keep_states() const {
    for (Index k = 0; k < plan_->states.count; ++k) {
      if (!call_->finals[k]) continue;
      const Index width = plan_->states.data[k];
      const State& init = call_->inits[k];
      for (Index b = rows_.begin; b < rows_.end; ++b)
        gather(static_cast<C*>(call_->finals[k]) + b * width,
               init.data ? static_cast<const C*>(init.data) + b * init.row : zeros_, 1, width);
    }
  }

  // ---- the walk ---------------------------------------------------------------------------------

  Index time_of(Index s) const { return call_->reverse ? T_ - 1 - s : s; }

  void block_of_steps(Index begin, Index end) {
    first_time_ = call_->reverse ? T_ - end : begin;
    const Index count = end - begin;
    Index products = 0;
    over_pairs(kBefore, count, products);
    if (columns_ && plan_->phases[kBefore].count > 0) meet(Barrier::Wait::part);
    products += products_in(kBefore);
    if (plan_->phases[kStep].count > 0) steps(begin, end, products);
    products += products_in(kStep);
    over_pairs(kAfter, count, products);
    if (plan_->sums.count > 0) {
      meet(Barrier::Wait::part);
      pair_sums(count, begin == 0);
    }
    if (end < T_ && (columns_ || plan_->sums.count > 0)) meet(Barrier::Wait::part);
  }

  Index products_in(int phase) const {
    Index count = 0;
    for (Index i = 0; i < plan_->phases[phase].count; ++i)
      count += plan_->phases[phase].data[i].kind == Instruction::Kind::product ? 1 : 0;
    return count;
  }

  // Rows of a chunk: the thread's rows in as few chunks as possible, of about equal size.
  Index rows_of_chunk() const {
    const Index rows = rows_.end - rows_.begin;
    return rows > 0 ? ceil_div(rows, ceil_div(rows, plan_->chunk)) : 1;
  }

  // All pairs of the block: of the thread's rows, or of its steps.
  void over_pairs(int phase, Index count, Index products) {
    if (plan_->phases[phase].count == 0) return;
    const Range steps = columns_ ? split(count, thread_, threads_) : Range{0, count};
    const Index rows = rows_.end - rows_.begin;
    if (rows == 0) return;
    const Index most = rows < plan_->chunk ? plan_->chunk / rows : 1, part = rows_of_chunk();
    for (Index i = steps.begin; i < steps.end;) {
      Chunk chunk;
      chunk.t = first_time_ + i;
      chunk.steps = least(most, steps.end - i);
      if (plan_->before_first && chunk.t == 0) chunk.steps = 1;
      if (plan_->after_last && chunk.t + chunk.steps == T_ && chunk.steps > 1) --chunk.steps;
      for (Index b = rows_.begin; b < rows_.end; b += part) {
        chunk.b = b;
        chunk.rows = least(part, rows_.end - b);
        through(phase, chunk, 0, products, mine_->locals, false);
      }
      i += chunk.steps;
    }
  }

  // Where the cores are oversubscribed, all would wait for a thread without a core after each
  // instruction. Then the first thread runs alone and the others rest until the cores are free
  // again, or until the end of the block.
  void steps(Index begin, Index end, Index products) {
    int resting = 0;
    for (Index s = begin; s < end;) {
      if (resting > 0 && plan_->barrier->all_ready(resting)) {
        plan_->barrier->resume(s);
        resting = 0;
      }
      const bool oversubscribed = step(s++, products, resting == 0 && columns_);
      if (!oversubscribed || s == end) continue;
      if (thread_ > 0)
        s = plan_->barrier->rest(solo_phases_++);
      else
        resting = threads_ - 1;
    }
    if (resting > 0) plan_->barrier->resume(end);
  }

  // Returns whether the team's cores are oversubscribed, where the threads share the columns.
  bool step(Index s, Index products, bool together) {
    Chunk chunk;
    chunk.t = time_of(s);
    chunk.steps = 1;
    bool oversubscribed = false;
    const Index part = rows_of_chunk();
    for (Index b = rows_.begin; b < rows_.end; b += part) {
      chunk.b = b;
      chunk.rows = least(part, rows_.end - b);
      oversubscribed =
          through(kStep, chunk, s, products, columns_ ? team_locals_ : mine_->locals, together);
    }
    return oversubscribed;
  }

  bool through(int phase, const Chunk& chunk, Index s, Index products, C* locals, bool together) {
    for (Index i = 0; i < plan_->used[phase].count; ++i) {
      const int value = plan_->used[phase].data[i];
      mine_->places[value] = place(value, chunk, s, locals);
    }
    const auto& list = plan_->phases[phase];
    bool oversubscribed = false;
    for (Index i = 0; i < list.count; ++i) {
      const Instruction& instruction = list.data[i];
      execute(instruction, chunk, together, products);
      if (instruction.kind == Instruction::Kind::product) ++products;
      if (together) oversubscribed = meet(Barrier::Wait::step);
    }
    return oversubscribed;
  }

  // ---- where values lie -------------------------------------------------------------------------

  Place<C> place(int id, const Chunk& chunk, Index s, C* locals) const {
    const ProgramValue& value = plan_->values.data[id];
    const Index width = value.width, b = chunk.b;
    switch (value.home) {
      case Home::shared:
        return {const_cast<C*>(shared(id)), 0, 0};
      case Home::sequence:
        return sequence(value, chunk.t, b);
      case Home::fixed:
        return state(call_->fixed[value.index], b);
      case Home::carry:
        if (s == 0) return state(call_->inits[value.index], b);
        return {copy_of_state(value, s, b), 0, width};
      case Home::next:
        if (s == T_ - 1 && call_->finals[value.index])
          return {static_cast<C*>(call_->finals[value.index]) + b * width, 0, width};
        return {copy_of_state(value, s + 1, b), 0, width};
      case Home::block:
        return {blocks_[id] + ((chunk.t - first_time_) * B_ + b) * width, B_ * width, width};
      case Home::local: {
        const Index row = ceil_div(width, lanes) * lanes;
        return {locals + local_offsets_[id] * plan_->chunk, chunk.rows * row, row};
      }
      case Home::tile:
        break;
    }
    return {};
  }

  Place<C> state(const State& a, Index b) const {
    if (!a.data) return {zeros_, 0, 0};
    return {static_cast<C*>(a.data) + b * a.row, 0, a.row};
  }

  Place<C> sequence(const ProgramValue& value, Index t, Index b) const {
    const Index from = t + value.previous;
    if (from < 0 || from >= T_) return state(call_->firsts[value.index], b);
    const Sequence& a = call_->sequences[value.index];
    return {static_cast<C*>(a.data) + from * a.step + b * a.row, a.step, a.row};
  }

  C* copy_of_state(const ProgramValue& value, Index s, Index b) const {
    return states_[value.index] + ((s & 1) * B_ + b) * value.width;
  }

  // ---- instructions -----------------------------------------------------------------------------

  Range share(Index count, bool together) const {
    return together ? split(count, thread_, threads_) : Range{0, count};
  }

  void execute(const Instruction& instruction, const Chunk& chunk, bool together, Index product) {
    const Place<C>* const places = mine_->places;
    switch (instruction.kind) {
      case Instruction::Kind::product:
        return multiply(weights_of(instruction.product, product), chunk, together);
      case Instruction::Kind::run: {
        const PointwiseRun& run = instruction.run;
        const Range vectors = share(ceil_div(run.width, lanes), together);
        return Run<C>(*plan_, run, mine_->points, places, constants_)
            .over(chunk, {vectors.begin * lanes, least(vectors.end * lanes, run.width)});
      }
      case Instruction::Kind::reduce: {
        const Reduce& r = instruction.reduce;
        if (r.of_row()) {
          const Range whole = share(1, together);
          if (whole.begin == whole.end) return;
          return run_norm(r, chunk, places[r.out.value], places[r.in.value],
                          r.second.value >= 0 ? places[r.second.value] : Place<C>{});
        }
        return run_reduce(r, chunk, places[r.out.value], places[r.in.value], share(r.G, together));
      }
      case Instruction::Kind::collect: {
        const Collect& c = instruction.collect;
        return run_collect(c, plan_->tables.data[c.table], chunk, places[c.out.value],
                           places[c.in.value], share(c.count, together));
      }
    }
  }

  void multiply(const Weights<C>& weights, const Chunk& chunk, bool together) {
    const Product& p = weights.p;
    const Place<C>* const places = mine_->places;
    const Place<C>&in = places[p.in.value], &out = places[p.out.value];
    const bool initial = p.init.value >= 0;
    Index n = 0;
    for (Index i = 0; i < chunk.steps; ++i)
      for (Index j = 0; j < chunk.rows; ++j, ++n) {
        mine_->in[n] = in.at(i, j) + p.in.offset;
        mine_->out[n] = out.at(i, j) + p.out.offset;
        if (initial) mine_->init[n] = places[p.init.value].at(i, j) + p.init.offset;
      }
    const ProductRows<C> rows{mine_->in, mine_->out, initial ? mine_->init : nullptr, n};
    RunProduct<C>(weights, rows).over(share(weights.items(), together));
  }

  // ---- pair sums --------------------------------------------------------------------------------

  void pair_sums(Index count, bool first) {
    Index met = 0;  // the first sum since a barrier
    for (Index i = 0; i < plan_->sums.count; ++i) {
      const PairSum& sum = plan_->sums.data[i];
      for (Index j = met; j < i; ++j)
        if (plan_->sums.data[j].target == sum.target) {
          meet(Barrier::Wait::part);
          met = i;
          break;
        }
      pair_sum(sum, count * B_, first && sum.starts);
    }
  }

  // `starts`: the first pairs are written, not added.
  void pair_sum(const PairSum& sum, Index pairs, bool starts) {
    C* const target = static_cast<C*>(call_->gradients[sum.target]);
    const Sums& scratch = mine_->sums;
    const SumMatrix m(sum);
    for (Index begin = 0; begin < pairs; begin += Sums::kPairs) {
      const Index count = least(Sums::kPairs, pairs - begin);
      if (sum.outer) {
        rows_of_pairs(m.line.value, begin, count, scratch.line_rows);
        rows_of_pairs(m.column.value, begin, count, scratch.column_rows);
        OuterSum<C>(sum, target, scratch, starts && begin == 0).add(count, thread_, threads_);
      } else {
        rows_of_pairs(sum.d.value, begin, count, scratch.line_rows);
        const Range vectors = split(ceil_div(sum.N, lanes), thread_, threads_);
        add_columns(sum, target, scratch, starts && begin == 0, count,
                    {vectors.begin * lanes, least(vectors.end * lanes, sum.N)});
      }
    }
  }

  void rows_of_pairs(int value, Index begin, Index count, const C** rows) const {
    Chunk at;
    at.t = first_time_ + begin / B_;
    for (Index n = 0, b = begin % B_; n < count; ++at.t, b = 0) {
      const Place<C> here = place(value, at, 0, nullptr);
      for (; b < B_ && n < count; ++b, ++n) rows[n] = here.at(0, b);
    }
  }

  const ProgramPlan* plan_;
  const ProgramCall* call_;
  Index T_, B_;
  C *constants_, *zeros_ = nullptr;
  ProductWeights* weights_;  // of each product, in the order of the phases
  C** blocks_;               // of each value
  C** states_;               // of each state: [2][B][width]
  Index* local_offsets_;     // of each value, in units of a chunk
  Index local_width_ = 0, zero_count_ = 0;
  C* team_locals_ = nullptr;
  Mine* threads_of_ = nullptr;
  std::size_t used_ = 0;

  // The thread's own.
  Mine* mine_ = nullptr;
  int thread_ = 0, threads_ = 1;
  bool columns_ = false;
  Range rows_{0, 0};
  std::uint32_t solo_phases_ = 0;  // through which the thread has rested
  Index first_time_ = 0;           // of the block of steps
};

template <class C>
std::size_t program_scratch(const ProgramPlan& plan) {
  Arena arena(nullptr);
  arena.take<Walk<C>>(1);
  return arena.used() + Walk<C>(plan, nullptr).used();
}
template <class C>
void lay_out_program(const ProgramPlan& plan, void* scratch) {
  Arena arena(scratch);
  Walk<C>* const walk = arena.take<Walk<C>>(1);
  *walk = Walk<C>(plan, static_cast<char*>(scratch) + arena.used());
}
template <class C>
void walk_program(const void* scratch, int thread, int threads) {
  Walk<C> walk = *static_cast<const Walk<C>*>(scratch);
  walk.run(thread, threads);
}

template <class C>
constexpr ProgramKernels::Of program_kernels_of() {
  return {Vec<C>::lanes, program_scratch<C>, lay_out_program<C>, walk_program<C>};
}
inline constexpr ProgramKernels program_kernels = {
    {program_kernels_of<float>(), program_kernels_of<double>()}};

}  // namespace fastrnn::FASTRNN_ISA
