#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fastrnn::virtual_device {
namespace {

constexpr std::uint32_t kRankShift = 24;  // in a cluster address
constexpr int kTurn = 400;                // most instructions of a warp while others wait

// ---- a warp -------------------------------------------------------------------------------------

void fill_constants(Warp& warp) {
  const Block& block = *warp.block;
  for (const Slot& constant : block.launch->function->constants)
    for (int lane = 0; lane < kLanes; ++lane) {
      std::uint64_t value = constant.value;
      switch (constant.special) {
        case Special::none:
          break;
        case Special::thread:
          value = static_cast<std::uint64_t>(warp.number * kLanes + lane);
          break;
        case Special::block:
          value = static_cast<std::uint64_t>(block.number);
          break;
      }
      warp.slot(constant.index)[lane] = value;
    }
}

// The group to run next: of the runnable groups, the one furthest back, or furthest ahead.
Group* next_group(Warp& warp, bool ahead) {
  Group* found = nullptr;
  for (Group& group : warp.groups)
    if (!group.waits && (!found || (group.at < found->at) != ahead)) found = &group;
  return found;
}

// Merges groups at the same instruction.
void merge(Warp& warp) {
  for (std::size_t i = 0; i < warp.groups.size(); ++i)
    for (std::size_t j = warp.groups.size() - 1; j > i; --j)
      if (warp.groups[j].at == warp.groups[i].at) {
        warp.groups[i].lanes |= warp.groups[j].lanes;
        warp.groups[i].waits = false;  // perhaps all lanes have arrived now
        warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(j));
      }
}

std::uint32_t lanes_that_execute(Warp& warp, const Instruction& in, std::uint32_t lanes) {
  if (in.guard < 0) return lanes;
  const std::uint64_t* const guard = warp.slot(in.guard);
  std::uint32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    found |= static_cast<std::uint32_t>((guard[lane] != 0) != in.unless) << lane;
  return lanes & found;
}

// Runs the warp until it waits, ends, or has executed `most` instructions; returns whether it did
// anything. Lanes may wait in a loop for other lanes of their warp that are ahead of them: after a
// turn that did not merge the groups, those ahead run first.
bool take_turn(Warp& warp, int most) {
  const std::vector<Instruction>& code = warp.block->launch->function->code;
  const bool ahead = warp.parted && !warp.ahead;
  bool moved = false;
  warp.yields = false;
  int n = 0;
  for (; n < most && !warp.yields && !warp.at_block_barrier; ++n) {
    if (warp.groups.size() > 1) merge(warp);
    Group* const group = next_group(warp, ahead);
    if (!group) {
      if (warp.groups.empty()) return moved;
      refuse("the lanes of a warp wait for each other at different instructions, lines " +
             std::to_string(code[static_cast<std::size_t>(warp.groups[0].at)].line) + " and " +
             std::to_string(code[static_cast<std::size_t>(warp.groups.back().at)].line));
    }
    const Instruction& in = code[static_cast<std::size_t>(group->at)];
    warp.line = in.line;
    const bool together = in.kind == Kind::together || in.kind == Kind::block_barrier;
    if (together && group->lanes != warp.alive) {
      group->waits = moved = true;
      continue;
    }
    if (together && warp.alive != kAllLanes)
      refuse("a lane has ended before an instruction for the whole warp");
    warp.active = lanes_that_execute(warp, in, group->lanes);
    if (together && warp.active && warp.active != group->lanes)
      refuse("an instruction for the whole warp under a predicate of some lanes");
    moved = true;
    switch (in.kind) {
      case Kind::plain:
      case Kind::together:
        warp.again = false;
        if (warp.active) in.run(warp, in);
        if (!warp.again) ++group->at;
        break;
      case Kind::branch: {
        const std::uint32_t stay = group->lanes & ~warp.active;
        const int behind = group->at + 1;
        if (!warp.active) {
          group->at = behind;
        } else if (!stay) {
          group->at = in.target;
        } else {
          *group = {in.target, warp.active};
          warp.groups.push_back({behind, stay});
        }
        break;
      }
      case Kind::leave:
        warp.alive &= ~warp.active;
        group->lanes &= ~warp.active;
        ++group->at;
        if (!group->lanes) {
          warp.groups.erase(warp.groups.begin() + (group - warp.groups.data()));
          for (Group& other : warp.groups) other.waits = false;
        }
        break;
      case Kind::block_barrier:
        ++group->at;
        warp.at_block_barrier = true;
        break;
    }
  }
  warp.parted = n == most && warp.groups.size() > 1;
  warp.ahead = ahead;
  return moved;
}

// ---- concurrent blocks --------------------------------------------------------------------------

// Reuses slots of warps that have ended: an unwritten register holds NaN, or a value of another
// warp.
std::vector<std::vector<std::uint64_t>>& spare_slots() {
  static std::vector<std::vector<std::uint64_t>> all;
  return all;
}
std::vector<std::uint64_t> take_slots(std::size_t count) {
  std::vector<std::uint64_t> slots;
  if (!spare_slots().empty()) {
    slots = std::move(spare_slots().back());
    spare_slots().pop_back();
  }
  slots.resize(count, ~0ull);
  return slots;
}

class Together {
 public:
  Together(const Launch& launch, int first, int count, int of_cluster, Order order,
           std::mt19937& random)
      : launch_(launch),
        order_(order),
        random_(random),
        blocks_(static_cast<std::size_t>(count)),
        clusters_(static_cast<std::size_t>(count / of_cluster)) {
    const std::size_t shared = launch.function->shared_bytes + launch.dynamic_shared;
    for (int i = 0; i < count; ++i) {
      Block& block = blocks_[static_cast<std::size_t>(i)];
      Cluster& cluster = clusters_[static_cast<std::size_t>(i / of_cluster)];
      block.launch = &launch;
      block.cluster = &cluster;
      block.number = first + i;
      block.rank = i % of_cluster;
      block.shared.assign(shared, 0xff);
      block.warps.resize(static_cast<std::size_t>(launch.threads / kLanes));
      cluster.blocks.push_back(&block);
      for (Warp& warp : block.warps) {
        warp.block = &block;
        warp.number = static_cast<int>(&warp - block.warps.data());
        warp.slots = take_slots(static_cast<std::size_t>(launch.function->slots) * kLanes);
        warp.groups.push_back({0, kAllLanes});
        fill_constants(warp);
        warps_.push_back(&warp);
      }
    }
  }

  ~Together() {
    for (Warp* const warp : warps_) spare_slots().push_back(std::move(warp->slots));
  }
  Together(const Together&) = delete;

  void run() {
    std::size_t left = warps_.size();
    for (long turns = 0; left > 0; ++turns) {
      if (turns == launch_.most_turns) refuse("it does not end");
      if (order_ == Order::shuffled) std::shuffle(warps_.begin(), warps_.end(), random_);
      bool moved = false;
      for (Warp* const warp : warps_) {
        if (warp->groups.empty() || warp->at_block_barrier) continue;
        const int most =
            order_ == Order::shuffled ? static_cast<int>(random_() % kTurn) + 1 : kTurn;
        try {
          moved |= take_turn(*warp, most);
        } catch (const std::runtime_error& error) {
          refuse("PTX line " + std::to_string(warp->line) + ": " + error.what());
        }
        left -= warp->groups.empty();
        moved |= deliver(*warp->block->cluster);
      }
      moved |= open_block_barriers();
      if (!moved && left > 0) refuse("no thread can continue");
    }
    for (Cluster& cluster : clusters_)
      if (!cluster.parcels.empty()) refuse("a block has ended before the data sent to it arrived");
  }

 private:
  bool open_block_barriers() {
    bool opened = false;
    for (Block& block : blocks_) {
      const bool all = std::all_of(block.warps.begin(), block.warps.end(), [](const Warp& warp) {
        return warp.at_block_barrier || warp.groups.empty();
      });
      for (Warp& warp : block.warps)
        if (all && warp.at_block_barrier) {
          if (std::any_of(block.warps.begin(), block.warps.end(),
                          [](const Warp& other) { return other.groups.empty(); }))
            refuse("a warp has ended before a barrier of its block");
          warp.at_block_barrier = false;
          opened = true;
        }
    }
    return opened;
  }

  // Delivers some of the parcels in flight.
  bool deliver(Cluster& cluster) {
    std::vector<Parcel>& parcels = cluster.parcels;
    if (parcels.empty()) return false;
    std::size_t count = parcels.size();
    if (order_ == Order::shuffled) {
      std::shuffle(parcels.begin(), parcels.end(), random_);
      count = random_() % (count + 1);
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Parcel& parcel = parcels[i];
      Block& any = *cluster.blocks.front();
      std::memcpy(cluster_memory(any, parcel.to, 16), parcel.words, 16);
      const auto of = [&](std::uint32_t address) -> Block& {
        return *cluster.blocks[(address >> kRankShift) - 1];
      };
      if (&of(parcel.to) != &of(parcel.barrier))
        refuse("the barrier and the destination of st.async are in different blocks");
      Mbarrier(of(parcel.barrier), parcel.barrier & ((1u << kRankShift) - 1)).bytes_came(16);
    }
    parcels.erase(parcels.begin(), parcels.begin() + static_cast<std::ptrdiff_t>(count));
    return true;  // even if none arrived, because they will
  }

  const Launch& launch_;
  Order order_;
  std::mt19937& random_;
  std::vector<Block> blocks_;
  std::vector<Cluster> clusters_;
  std::vector<Warp*> warps_;
};

}  // namespace

void refuse(const std::string& what) { throw std::runtime_error(what); }

void* shared_memory(Block& block, std::uint64_t address, std::size_t bytes) {
  if (address + bytes > block.shared.size())
    refuse("shared memory: byte " + std::to_string(address) + " of " +
           std::to_string(block.shared.size()));
  if (address % bytes)
    refuse("shared memory: address " + std::to_string(address) + " is misaligned");
  return block.shared.data() + address;
}

void* cluster_memory(Block& block, std::uint64_t address, std::size_t bytes) {
  const std::uint64_t rank = address >> kRankShift;
  if (rank == 0) return shared_memory(block, address, bytes);
  if (rank > block.cluster->blocks.size()) refuse("an address outside the cluster");
  return shared_memory(*block.cluster->blocks[rank - 1], address & ((1u << kRankShift) - 1), bytes);
}

Mbarrier::Mbarrier(Block& block, std::uint64_t address, bool initialised)
    : word_(static_cast<unsigned char*>(shared_memory(block, address, sizeof(State)))) {
  const auto key = static_cast<std::uint32_t>(address);
  if (!initialised)
    block.barriers.insert(key);
  else if (!block.barriers.count(key))
    refuse("a barrier is not initialised");
}

void Mbarrier::initialise(int count) {
  const State state{0, static_cast<std::uint8_t>(count), static_cast<std::uint8_t>(count), 0};
  std::memcpy(word_, &state, sizeof(state));
}

void Mbarrier::expect(std::int32_t bytes) {
  State state;
  std::memcpy(&state, word_, sizeof(state));
  if (state.pending == 0) refuse("too many arrivals at a barrier");
  state.bytes += bytes;
  --state.pending;
  std::memcpy(word_, &state, sizeof(state));
  complete_phase();
}

void Mbarrier::bytes_came(std::int32_t bytes) {
  State state;
  std::memcpy(&state, word_, sizeof(state));
  state.bytes -= bytes;
  std::memcpy(word_, &state, sizeof(state));
  complete_phase();
}

void Mbarrier::complete_phase() {
  State state;
  std::memcpy(&state, word_, sizeof(state));
  if (state.pending || state.bytes) return;
  state.pending = state.count;
  ++state.phase;
  std::memcpy(word_, &state, sizeof(state));
}

bool Mbarrier::completed(unsigned parity) const {
  State state;
  std::memcpy(&state, word_, sizeof(state));
  return (state.phase & 1u) != parity;
}

void run(const Launch& launch, Order order, std::mt19937& random) {
  const int at_once = launch.cooperative ? launch.blocks : launch.cluster;
  std::vector<int> firsts(static_cast<std::size_t>(launch.blocks / at_once));
  for (std::size_t i = 0; i < firsts.size(); ++i) firsts[i] = static_cast<int>(i) * at_once;
  if (order == Order::shuffled) std::shuffle(firsts.begin(), firsts.end(), random);
  try {
    for (const int first : firsts)
      Together(launch, first, at_once, launch.cluster, order, random).run();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(launch.function->name + ": " + error.what());
  }
}

}  // namespace fastrnn::virtual_device
