// What nvcc makes of a kernel, PTX, as the virtual device runs it (machine.h).
//
// Each virtual register is a 64-bit slot for each lane of a warp, which holds the register's bits,
// zero above them. Constants and special registers have slots too, filled when a warp begins, so
// that every operand is a slot. An address in parameter, shared or local memory is an offset; one
// in global memory is the host's.
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

// How an instruction concerns more than the lanes that execute it.
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
  int target = -1;          // of a branch
  std::int64_t offset = 0;  // added to the address
  std::vector<int> slots;   // of its operands in their order, the elements of lists one by one
  int line = 0;             // of the PTX
};

// Which value a special register has.
enum class Special { none, thread, block };

struct Slot {
  int index;
  Special special;
  std::uint64_t value;
};

struct Function {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Slot> constants;  // filled when a warp begins
  int slots = 0;
  std::size_t parameter_bytes = 0;
  std::size_t shared_bytes = 0;  // what it declares; what the launch adds comes behind
};

// The functions of one module. Throws std::runtime_error at whatever the machine does not know.
class Module {
 public:
  explicit Module(std::string_view text);
  const Function& function(const std::string& name) const;

 private:
  std::map<std::string, Function> functions_;
};

// An opcode with its modifiers ("fma.rn.f32"); throws where it is unknown. Fills run, kind.
void decode(const std::string& opcode, Instruction* in);

}  // namespace fastrnn::virtual_device
