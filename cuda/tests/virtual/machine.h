// A GPU on the CPU: runs the PTX of a kernel, warp by warp, with the 32 lanes of a warp in step.
//
// Lanes       diverging lanes form groups, each with its own program counter. The group that is
//             furthest back runs first, and groups at the same instruction merge. Instructions for
//             the whole warp (shuffles, tensor cores, barriers) wait until all lanes have arrived;
//             if they never do, that is an error.
// Warps       the warps of concurrent blocks take turns, of random length if shuffled: all blocks
//             of a cluster or of a cooperative launch, otherwise one block after another. So a
//             kernel that waits for another block works here only if it may wait for it.
// Memory      Global addresses are host addresses, so AddressSanitizer reports invalid accesses of
//             a kernel. Shared memory is bounds-checked and filled with NaN. A misaligned access,
//             which a GPU rejects but a CPU tolerates, is an error.
// Clusters    Bytes sent by st.async arrive later, in any order; the mbarrier that counts them is a
//             word of 64 bits, as on a GPU.
//
// It does not model weak memory (persistent/tests/ring_test.cpp does) or machine code, and is slow.
#pragma once

#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "ptx.h"

namespace fastrnn::virtual_device {

inline constexpr int kLanes = 32;
inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

enum class Order { in_turn, shuffled };

struct Launch {
  const Function* function = nullptr;
  std::vector<unsigned char> parameters;
  int blocks = 1, threads = 1;
  int cluster = 1;           // blocks per cluster
  bool cooperative = false;  // all blocks run concurrently
  std::size_t dynamic_shared = 0;
  long most_turns = 10'000'000;  // of all warps; more count as an endless kernel
};

struct Block;

// Lanes at the same instruction.
struct Group {
  int at;
  std::uint32_t lanes;
  bool waits = false;  // at an instruction for the whole warp, or the whole block
};

struct Warp {
  Block* block = nullptr;
  int number = 0;  // of the block
  std::vector<std::uint64_t> slots;
  std::vector<Group> groups;
  std::uint32_t alive = kAllLanes;
  std::uint32_t active = 0;  // lanes that execute the current instruction
  bool at_block_barrier = false;
  bool yields = false;      // a wait that has not ended
  bool again = false;       // repeat the instruction
  bool parted = false;      // its last turn ended with several groups,
  bool ahead = false;       // and those ahead ran first
  int line = 0;             // of the PTX, for errors
  long cluster_phase = -1;  // that it arrived in

  std::uint64_t* slot(int index) { return slots.data() + static_cast<std::size_t>(index) * kLanes; }
};

// Bytes in flight to another block's shared memory.
struct Parcel {
  std::uint32_t to, barrier;  // addresses of the cluster
  std::uint32_t words[4];
};

struct Cluster {
  std::vector<Block*> blocks;
  std::vector<Parcel> parcels;
  long phase = 0;
  int arrived = 0;  // warps, in this phase
};

struct Block {
  const Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  int number = 0, rank = 0;  // of the grid, of the cluster
  std::vector<unsigned char> shared;
  std::vector<Warp> warps;
  std::set<std::uint32_t> barriers;  // mbarriers that have been initialised
};

// Runs a launch to its end. Throws std::runtime_error, with the kernel and the PTX line, for errors
// that a GPU would reject, or if no thread can continue.
void run(const Launch& launch, Order order, std::mt19937& random);

// For decode(): the memory operations of instructions.
[[noreturn]] void refuse(const std::string& what);
void* shared_memory(Block& block, std::uint64_t address, std::size_t bytes);
// A cluster address: the rank of the block plus one in the upper byte; zero: the own block.
void* cluster_memory(Block& block, std::uint64_t address, std::size_t bytes);

// An mbarrier, of one 64-bit word.
class Mbarrier {
 public:
  Mbarrier(Block& block, std::uint64_t address, bool initialised = true);
  void initialise(int count);
  void expect(std::int32_t bytes);  // and arrive
  void bytes_came(std::int32_t bytes);
  bool completed(unsigned parity) const;

 private:
  struct State {
    std::int32_t bytes;  // still missing; may be negative before they are expected
    std::uint8_t count, pending;
    std::uint16_t phase;
  };
  static_assert(sizeof(State) == 8);
  void complete_phase();
  unsigned char* word_;
};

}  // namespace fastrnn::virtual_device
