// The check of a program: a program that passes neither reads nor writes out of bounds, nor reads
// elements that were not written, whatever the caller's arrays hold. Each access is checked element
// by element.
#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

#include "../program.h"

namespace fastrnn {
namespace {

using Index = std::int64_t;

constexpr Index kMostElements = Index{1} << 26;  // of a row
constexpr Index kMostStride = Index{1} << 34;    // three of them times kMostElements fit in 64 bits

const char* name_of(Home home) { return kHomeNames[static_cast<int>(home)]; }

// The elements offset + i·first + j·second + k of a row, i < firsts, j < seconds, k < run.
struct Access {
  RowAt at;
  Index firsts = 1, first = 0, seconds = 1, second = 0, run = 1;

  template <class Body>
  void each(Body body) const {
    for (Index i = 0; i < (first == 0 ? 1 : firsts); ++i)
      for (Index j = 0; j < (second == 0 ? 1 : seconds); ++j)
        for (Index k = 0; k < run; ++k) body(at.offset + i * first + j * second + k);
  }
};

struct Span {
  Index stride, count;
};

// The least and the greatest offset that is accessed.
Reach reach_of(Index offset, std::initializer_list<Span> spans) {
  Reach reach{offset, offset, 0};
  for (const Span& s : spans) {
    const Index far = s.stride * (s.count - 1);
    (far < 0 ? reach.low : reach.high) += far;
  }
  return reach;
}

void widen_reach(Reach& all, const Reach& one) {
  const bool none = all.high < all.low;
  all.low = none ? one.low : std::min(all.low, one.low);
  all.high = none ? one.high : std::max(all.high, one.high);
}

template <class T>
typename std::vector<T>::reference grown(std::vector<T>& list, Index index) {
  if (static_cast<Index>(list.size()) <= index) list.resize(static_cast<std::size_t>(index) + 1);
  return list[static_cast<std::size_t>(index)];
}

class Checker {
 public:
  Checker(ProgramText& text, Program& program) : text_(text), program_(program) {}

  void check() {
    if (text_.dtype != DType::f32 && text_.dtype != DType::f64)
      fail("dtype: expected float32 or float64");
    check_values();
    check_tables();
    constexpr const char* names[] = {"before", "step", "after"};
    for (phase_ = kBefore; phase_ < kPhases; ++phase_) {
      for (std::size_t v = 0; v < text_.values.size(); ++v)
        if (text_.values[v].home == Home::local) covered_[v].assign(covered_[v].size(), false);
      for (std::size_t i = 0; i < text_.phases[phase_].size(); ++i) {
        const Instruction& instruction = text_.phases[phase_][i];
        place_ = std::string(names[phase_]) + "[" + std::to_string(i) + "] (" +
                 Instruction::kNames[static_cast<int>(instruction.kind)] + ")";
        check_instruction(instruction);
      }
      std::vector<int>& used = program_.used[phase_];
      std::sort(used.begin(), used.end());
      used.erase(std::unique(used.begin(), used.end()), used.end());
    }
    for (std::size_t i = 0; i < text_.sums.size(); ++i) {
      place_ = "reductions[" + std::to_string(i) + "]";
      check_sum(text_.sums[i]);
    }
    place_.clear();
    check_written();
    find_starts();
  }

 private:
  [[noreturn]] void fail(const std::string& message) const {
    throw std::invalid_argument((place_.empty() ? "program" : place_) + ": " + message);
  }

  // ---- values and tables ------------------------------------------------------------------------

  const ProgramValue& at(int value) const { return text_.values[static_cast<std::size_t>(value)]; }

  std::string text_of(int value) const {
    const ProgramValue& v = at(value);
    return "value " + std::to_string(value) + " (" + name_of(v.home) + " " +
           std::to_string(v.index) + ", width " + std::to_string(v.width) + ")";
  }

  void check_values() {
    for (std::size_t i = 0; i < text_.values.size(); ++i) {
      const ProgramValue& v = text_.values[i];
      place_ = "values[" + std::to_string(i) + "]";
      expect("width", v.width, v.home == Home::tile ? 0 : 1, kMostElements);
      expect("index", v.index, 0, v.home == Home::tile ? kTileRegisters - 1 : 65535);
      expect("previous", v.previous, v.home == Home::sequence ? -1 : 0,
             v.home == Home::sequence ? 1 : 0);
      covered_.emplace_back(static_cast<std::size_t>(v.home == Home::tile ? 0 : v.width), false);
      written_by_.push_back(-1);
      switch (v.home) {
        case Home::shared:
          grown(program_.shared, v.index);
          break;
        case Home::sequence:
          width(program_.sequences, v);
          if (v.previous != 0) grown(program_.previous, v.index) = true;
          program_.before_first = program_.before_first || v.previous < 0;
          program_.after_last = program_.after_last || v.previous > 0;
          break;
        case Home::fixed:
          width(program_.fixed, v);
          break;
        case Home::carry:
        case Home::next:
          width(program_.states, v);
          break;
        case Home::block:
        case Home::local:
        case Home::tile:
          break;
      }
    }
    program_.previous.resize(program_.sequences.size());
    program_.written.resize(program_.sequences.size());
  }

  void width(std::vector<Index>& widths, const ProgramValue& v) const {
    Index& known = grown(widths, v.index);
    if (known != 0 && known != v.width)
      fail(std::string("width: expected ") + std::to_string(known) + ", as another value of " +
           name_of(v.home) + " " + std::to_string(v.index) + " has, got " +
           std::to_string(v.width));
    known = v.width;
  }

  void check_tables() {
    for (std::size_t i = 0; i < text_.tables.size(); ++i) {
      const ProgramTable& table = text_.tables[i];
      place_ = "tables[" + std::to_string(i) + "]";
      const auto end = static_cast<Index>(table.indices.size());
      if (table.starts.empty() || table.starts.front() != 0 || table.starts.back() != end)
        fail("starts: expected to begin with 0 and to end with the number of indices, " +
             std::to_string(end));
      if (!std::is_sorted(table.starts.begin(), table.starts.end()))
        fail("starts: expected not to decrease");
      for (const Index index : table.indices) expect("an index", index, 0, kMostElements);
      program_.pieces.push_back(pieces_of(table));
    }
  }

  static std::vector<Piece> pieces_of(const ProgramTable& table) {
    std::vector<Piece> pieces;
    const auto outputs = static_cast<Index>(table.starts.size()) - 1;
    for (Index i = 0; i < outputs; ++i) {
      const Index start = table.starts[static_cast<std::size_t>(i)];
      const Index count = table.starts[static_cast<std::size_t>(i) + 1] - start;
      Piece piece{Piece::Kind::sums, i, 1, start};
      if (count == 0) piece = {Piece::Kind::zeros, i, 1, 0};
      if (count == 1)
        piece = {Piece::Kind::copy, i, 1, table.indices[static_cast<std::size_t>(start)]};
      Piece* last = pieces.empty() ? nullptr : &pieces.back();
      const bool goes_on =
          last != nullptr && last->kind == piece.kind &&
          (piece.kind != Piece::Kind::copy || last->from + last->count == piece.from);
      if (goes_on)
        ++last->count;
      else
        pieces.push_back(piece);
    }
    return pieces;
  }

  // ---- accesses ---------------------------------------------------------------------------------

  void expect(const char* what, Index value, Index least, Index most) const {
    if (value < least || value > most)
      fail(std::string(what) + ": expected " + std::to_string(least) + " to " +
           std::to_string(most) + ", got " + std::to_string(value));
  }
  void expect_stride(const char* what, Index value) const {
    expect(what, value, -kMostStride, kMostStride);
  }

  const ProgramValue& value(const RowAt& at, const char* what) const {
    expect(what, at.value, 0, static_cast<Index>(text_.values.size()) - 1);
    expect_stride("an offset", at.offset);
    return this->at(at.value);
  }

  void within(const Access& a, const char* what) const {
    const Reach reach =
        reach_of(a.at.offset, {{a.first, a.firsts}, {a.second, a.seconds}, {1, a.run}});
    const ProgramValue& v = at(a.at.value);
    if (reach.low < 0 || reach.high >= v.width)
      fail(std::string(what) + ": elements " + std::to_string(reach.low) + " to " +
           std::to_string(reach.high) + " do not lie inside " + text_of(a.at.value));
  }

  [[noreturn]] void refuse_home(const char* what, int value, const char* verb) const {
    fail(std::string(what) + ": " + text_of(value) + " cannot be " + verb + " here");
  }

  bool step_alone(Home home) const { return home == Home::carry || home == Home::next; }

  // Whether the program itself must have written a value before it reads it.
  bool needs_cover(const ProgramValue& v) const {
    return v.home == Home::block || v.home == Home::local || v.home == Home::next ||
           (v.home == Home::sequence && program_.written[static_cast<std::size_t>(v.index)]);
  }

  void reads(const Access& a, const char* what) {
    const ProgramValue& v = value(a.at, what);
    if (v.home == Home::tile || (step_alone(v.home) && phase_ != kStep))
      refuse_home(what, a.at.value, "read");
    within(a, what);
    if (phase_ < kPhases) program_.used[phase_].push_back(a.at.value);
    if (v.home == Home::shared) {
      Index& contiguous = program_.shared[static_cast<std::size_t>(v.index)].contiguous;
      contiguous = std::max(contiguous, v.width);
    }
    if (v.home == Home::sequence) read_sequences_.push_back(a.at.value);
    if (!needs_cover(v)) return;
    const std::vector<bool>& covered = covered_[static_cast<std::size_t>(a.at.value)];
    a.each([&](Index i) {
      if (!covered[static_cast<std::size_t>(i)])
        fail(std::string(what) + ": element " + std::to_string(i) + " of " + text_of(a.at.value) +
             " is read before it is written");
    });
  }

  void writes(const Access& a, const char* what) {
    const ProgramValue& v = value(a.at, what);
    const bool may = v.home == Home::block || v.home == Home::local ||
                     (v.home == Home::sequence && v.previous == 0) ||
                     (v.home == Home::next && phase_ == kStep);
    if (!may) refuse_home(what, a.at.value, "written");
    within(a, what);
    program_.used[phase_].push_back(a.at.value);
    if (v.home == Home::sequence) write_sequence(a.at.value, v);
    if ((a.firsts > 1 && a.first == 0) || (a.seconds > 1 && a.second == 0)) fail_twice(what);
    std::vector<bool>& covered = covered_[static_cast<std::size_t>(a.at.value)];
    std::vector<bool> here(covered.size(), false);
    a.each([&](Index i) {
      const auto at = static_cast<std::size_t>(i);
      if (here[at]) fail_twice(what);
      here[at] = covered[at] = true;
    });
  }

  [[noreturn]] void fail_twice(const char* what) const {
    fail(std::string(what) + ": an element would be written twice");
  }

  void write_sequence(int id, const ProgramValue& v) {
    int& phase = written_by_[static_cast<std::size_t>(id)];
    if (phase >= 0 && phase != phase_)
      fail("out: " + text_of(id) + " is already written by another phase");
    for (const int other : read_sequences_)
      if (at(other).index == v.index && phase < 0)
        fail("out: " + text_of(id) + " has been read before");
    for (std::size_t other = 0; other < text_.values.size(); ++other) {
      const ProgramValue& o = text_.values[other];
      if (o.home == Home::sequence && o.index == v.index && static_cast<int>(other) != id)
        fail("out: " + text_of(id) + " is written, so no other value may use its array");
    }
    phase = phase_;
    program_.written[static_cast<std::size_t>(v.index)] = true;
  }

  // For an instruction that writes one output before it reads the next one's inputs.
  void apart(const Access& out, const Access& in, const char* what) const {
    if (out.at.value != in.at.value) return;
    std::vector<bool> written(covered_[static_cast<std::size_t>(out.at.value)].size(), false);
    out.each([&](Index i) { written[static_cast<std::size_t>(i)] = true; });
    in.each([&](Index i) {
      if (written[static_cast<std::size_t>(i)])
        fail(std::string(what) + ": element " + std::to_string(i) + " of " + text_of(in.at.value) +
             " is read and written");
    });
  }

  // ---- instructions -----------------------------------------------------------------------------

  void check_instruction(const Instruction& instruction) {
    switch (instruction.kind) {
      case Instruction::Kind::product:
        return check_product(instruction.product);
      case Instruction::Kind::run:
        return check_run(instruction.run);
      case Instruction::Kind::reduce:
        return check_reduce(instruction.reduce);
      case Instruction::Kind::collect:
        return check_collect(instruction.collect);
    }
  }

  void check_product(const Product& p) {
    expect("G", p.G, 1, kMostElements);
    expect("K", p.K, 1, kMostElements);
    expect("N", p.N, 1, kMostElements);
    for (const Index stride : {p.out_group, p.in_group, p.w_group, p.w_k, p.w_n})
      expect_stride("a stride", stride);
    const Access in{p.in, p.G, p.in_group, 1, 0, p.K}, out{p.out, p.G, p.out_group, 1, 0, p.N};
    Access init = out;
    init.at = p.init;
    reads(in, "inp");
    if (p.init.value >= 0) reads(init, "init");
    if (value(p.weight, "weight").home != Home::shared)
      fail("weight: expected a shared value, got " + text_of(p.weight.value));
    writes(out, "out");
    apart(out, in, "inp");
    if (p.init.value >= 0 && p.init.offset != p.out.offset) apart(out, init, "init");
    widen_reach(program_.shared[static_cast<std::size_t>(at(p.weight.value).index)],
                reach_of(p.weight.offset, {{p.w_group, p.G}, {p.w_k, p.K}, {p.w_n, p.N}}));
  }

  void check_reduce(const Reduce& r) {
    expect("G", r.G, 1, kMostElements);
    expect("n", r.n, 1, kMostElements);
    expect_stride("seg", r.segment);
    expect_stride("elem", r.element);
    const Access in{r.in, r.G, r.segment, r.n, r.element, 1};
    const Access out{r.out, 1, 0, 1, 0, r.of_row() ? 2 : r.G};
    reads(in, "inp");
    if (r.of_row()) {
      expect("G", r.G, 1, 1);
      expect("elem", r.element, 1, 1);
    }
    const bool two = r.kind == Reduce::Kind::means;
    if (two != (r.second.value >= 0)) fail("second: expected of means, and of no other kind");
    const Access second{r.second, 1, 0, r.n, 1, 1};
    if (two) reads(second, "second");
    writes(out, "out");
    apart(out, in, "inp");
    if (two) apart(out, second, "second");
  }

  void check_collect(const Collect& c) {
    expect("count", c.count, 1, kMostElements);
    expect("table", c.table, 0, static_cast<Index>(text_.tables.size()) - 1);
    const ProgramTable& table = text_.tables[static_cast<std::size_t>(c.table)];
    if (static_cast<Index>(table.starts.size()) != c.count + 1)
      fail("count: expected " + std::to_string(table.starts.size() - 1) +
           ", the outputs of the table, got " + std::to_string(c.count));
    const Access out{c.out, 1, 0, 1, 0, c.count};
    // Each index once: a table may list one very often.
    std::vector<Index> indices = table.indices;
    std::sort(indices.begin(), indices.end());
    indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
    value(c.in, "inp");
    if (indices.empty()) program_.used[phase_].push_back(c.in.value);
    for (const Index index : indices) reads({{c.in.value, c.in.offset + index}}, "inp");
    writes(out, "out");
    for (const Index index : indices) {
      if (c.out.value != c.in.value) break;
      const Index at = c.in.offset + index - c.out.offset;
      if (at >= 0 && at < c.count) fail("inp: an element is read and written");
    }
  }

  // ---- runs -------------------------------------------------------------------------------------

  struct Touch {
    RowAt at;
    Index count;
    bool vector, write;
  };

  void check_run(const PointwiseRun& run) {
    expect("width", run.width, 1, kMostElements);
    bool registers[kTileRegisters] = {};
    std::vector<Touch> touched;
    const auto touch = [&](const PointOperand& operand, bool write) {
      const bool vector = operand.kind == PointOperand::Kind::vector;
      const Touch now{operand.at, vector ? run.width : 1, vector, write};
      for (const Touch& t : touched) {
        const bool meet = t.at.value == now.at.value && (t.write || write) &&
                          t.at.offset < now.at.offset + now.count &&
                          now.at.offset < t.at.offset + t.count;
        if (meet && !(t.vector && vector && t.at.offset == now.at.offset))
          fail(text_of(now.at.value) + " is read and written at different offsets of one run");
      }
      touched.push_back(now);
    };
    const std::string place = place_;
    for (Index i = 0; i < run.count; ++i) {
      const PointOp& op = text_.points[static_cast<std::size_t>(run.first + i)];
      const PointName& name = kPointNames[static_cast<int>(op.code)];
      place_ = place + " op " + std::to_string(i) + " (" + name.name + ")";
      constexpr const char* operands[] = {"a", "b", "c"};
      for (int j = 0; j < 3; ++j) {
        if ((op.from[j].kind != PointOperand::Kind::absent) != (j < name.operands))
          fail(std::string("expected ") + std::to_string(name.operands) + " operands");
        if (j < name.operands) check_source(op.from[j], operands[j], run.width, registers, touch);
      }
      check_target(op.to, run.width, registers, touch);
    }
  }

  template <class Touched>
  void check_source(const PointOperand& from, const char* what, Index width,
                    const bool (&registers)[kTileRegisters], Touched touch) {
    if (from.kind == PointOperand::Kind::constant)
      return expect("a constant", from.at.offset, 0,
                    static_cast<Index>(text_.constants.size()) - 1);
    const ProgramValue& v = value(from.at, what);
    const bool vector = from.kind == PointOperand::Kind::vector;
    if (v.home == Home::tile) {
      if (!vector || from.at.offset != 0)
        fail(std::string(what) + ": a tile register is read whole, at offset 0");
      if (!registers[v.index])
        fail(std::string(what) + ": tile register " + std::to_string(v.index) +
             " is read before this run writes it");
      return;
    }
    reads({from.at, 1, 0, 1, 0, vector ? width : 1}, what);
    touch(from, false);
  }

  template <class Touched>
  void check_target(const PointOperand& to, Index width, bool (&registers)[kTileRegisters],
                    Touched touch) {
    if (to.kind != PointOperand::Kind::vector) fail("dst: expected a vector of a value");
    const ProgramValue& v = value(to.at, "dst");
    if (v.home == Home::tile) {
      if (to.at.offset != 0) fail("dst: a tile register is written whole, at offset 0");
      registers[v.index] = true;
      return;
    }
    writes({to.at, 1, 0, 1, 0, width}, "dst");
    touch(to, true);
  }

  // ---- pair sums and ends -----------------------------------------------------------------------

  void check_sum(const PairSum& s) {
    expect("target", s.target, 0, 65535);
    for (const Index count : {s.G, s.K, s.N}) expect("a count", count, 1, kMostElements);
    for (const Index stride : {s.offset, s.d_group, s.x_group, s.w_group, s.w_k, s.w_n})
      expect_stride("a stride", stride);
    operand({s.d, s.G, s.d_group, 1, 0, s.N}, "d");
    if (s.outer) operand({s.x, s.G, s.x_group, 1, 0, s.K}, "x");
    // The elements are divided among the threads, so no two sums may have the same element.
    std::vector<Span> spans{{std::abs(s.w_k), s.K}, {std::abs(s.w_n), s.N}};
    if (s.w_group != 0) spans.push_back({std::abs(s.w_group), s.G});
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.stride < b.stride; });
    Index covered = 0;
    for (const Span& span : spans) {
      if (span.count == 1) continue;
      if (span.stride <= covered) fail("w_group, w_k, w_n: two sums have the same element");
      covered += span.stride * (span.count - 1);
    }
    const Reach reach = reach_of(s.offset, {{s.w_group, s.G}, {s.w_k, s.K}, {s.w_n, s.N}});
    if (reach.low < 0) fail("off: there is no element " + std::to_string(reach.low));
    widen_reach(grown(program_.gradients, s.target), reach);
  }

  void operand(const Access& a, const char* what) {
    const Home home = value(a.at, what).home;
    if (home != Home::sequence && home != Home::fixed && home != Home::block)
      refuse_home(what, a.at.value, "summed");
    reads(a, what);
  }

  // ---- which sums start their elements ----------------------------------------------------------

  // The elements of a sum, where they are contiguous; else none: high < low.
  static Reach whole_of(const PairSum& s) {
    const Span spans[] = {{s.w_k, s.K}, {s.w_n, s.N}, {s.w_group, s.w_group == 0 ? 1 : s.G}};
    Index elements = 1;
    for (const Span& span : spans) elements *= span.count;
    const Reach reach = reach_of(s.offset, {spans[0], spans[1], spans[2]});
    return reach.high - reach.low + 1 == elements ? reach : Reach{};
  }

  // A target whose sums overlap, or have gaps inside, is cleared first.
  void find_starts() {
    for (std::size_t target = 0; target < program_.gradients.size(); ++target) {
      std::vector<std::pair<Reach, PairSum*>> sums;
      bool whole = true;
      for (PairSum& s : text_.sums) {
        if (static_cast<std::size_t>(s.target) != target) continue;
        sums.emplace_back(whole_of(s), &s);
        whole = whole && sums.back().first.low <= sums.back().first.high;
      }
      std::sort(sums.begin(), sums.end(),
                [](const auto& a, const auto& b) { return a.first.low < b.first.low; });
      for (std::size_t i = 1; i < sums.size(); ++i)
        whole = whole && sums[i - 1].first.high < sums[i].first.low;
      Index end = 0;
      for (const auto& [reach, sum] : sums) {
        if (!whole) break;
        sum->starts = true;
        if (reach.low > end) program_.gaps.push_back({static_cast<int>(target), end, reach.low});
        end = reach.high + 1;
      }
      program_.gaps.push_back({static_cast<int>(target), end, -1});
    }
  }

  // All results must be written, and each state after each step.
  void check_written() {
    std::vector<bool> next(program_.states.size(), false);
    for (std::size_t i = 0; i < text_.values.size(); ++i) {
      const ProgramValue& v = text_.values[i];
      const bool is_next = v.home == Home::next;
      if (is_next && next[static_cast<std::size_t>(v.index)])
        fail(text_of(static_cast<int>(i)) + " is listed twice");
      if (is_next) next[static_cast<std::size_t>(v.index)] = true;
      if (!is_next && (v.home != Home::sequence || written_by_[i] < 0)) continue;
      for (std::size_t e = 0; e < covered_[i].size(); ++e)
        if (!covered_[i][e])
          fail("element " + std::to_string(e) + " of " + text_of(static_cast<int>(i)) +
               " is not written");
    }
    for (std::size_t k = 0; k < next.size(); ++k)
      if (program_.states[k] != 0 && !next[k])
        fail("carry " + std::to_string(k) + " has no next, its value after the step");
  }

  ProgramText& text_;
  Program& program_;
  std::string place_;
  int phase_ = 0;                           // kPhases: of the pair sums
  std::vector<std::vector<bool>> covered_;  // of each value, the elements written
  std::vector<int> written_by_;             // of each value that is a sequence: the phase, or −1
  std::vector<int> read_sequences_;
};

}  // namespace

Program::Program(ProgramText text) : text_(std::move(text)) { Checker(text_, *this).check(); }

}  // namespace fastrnn
