// The PTX of a kernel, parsed for the virtual device (machine.h).
//
// Each virtual register is a 64-bit slot for each lane of a warp, which holds the register's bits,
// with zeros above them. Constants and special registers also have slots, filled when a warp
// starts, so every operand is a slot. An address in parameter, shared or local memory is an offset;
// an address in global memory is a host address.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace fastrnn::virtual_device {

struct Warp;
struct Instruction;
using Execute = void (*)(Warp& warp, const Instruction& in);

// The kinds of instructions that affect more than the lanes that execute them.
enum class Kind {
  plain,
  branch,        // to `target`
  leave,         // the thread ends
  together,      // all lanes of the warp, at the same instruction
  block_barrier  // all threads of the block, each warp's lanes together
};

struct Instruction {
  Execute run = nullptr;
  Kind kind = Kind::plain;
  int guard = -1;  // a predicate's slot; -1: none
  bool unless = false;
  bool apart = false;       // its first operand is a list
  int target = -1;          // for a branch
  std::int64_t offset = 0;  // added to the address
  std::vector<int> slots;   // the operands in order, with the elements of lists separately
  int line = 0;             // of the PTX
};

// The value of a special register.
enum class Special { none, thread, block };

struct Slot {
  int index;
  Special special;
  std::uint64_t value;
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Slot> constants;  // filled when a warp starts
  int slots = 0;
  std::size_t parameter_bytes = 0;
  std::size_t shared_bytes = 0;  // static shared memory; the dynamic part follows it
};

// Parses the functions of one module. Throws std::runtime_error for anything unsupported.
class Module {
 public:
  explicit Module(std::string_view text);
  const Function& function(const std::string& name) const;

 private:
  std::map<std::string, Function> functions_;
};

// Decodes an opcode with its modifiers ("fma.rn.f32") into run and kind; throws if it is unknown.
void decode(const std::string& opcode, Instruction* in);

}  // namespace fastrnn::virtual_device
