// Chooses the instruction set: the widest that was built and that this CPU runs, or the one that
// FASTRNN_ISA names. Chosen once in a process.
#include <cstdlib>
#include <stdexcept>

#include "isa.h"
#include "layer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fastrnn {
namespace {

// Whether this CPU runs an instruction set.
struct Runs {
  static bool portable() { return true; }
  static bool neon() { return true; }  // every CPU that it is built for
#if defined(__x86_64__)
  static bool avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
  // By cpuid: not every compiler that we support knows this feature's name.
  static bool avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
  }
  static bool avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && avx2();
  }
  static bool avx512vnni() { return avx512() && __builtin_cpu_supports("avx512vnni"); }
  static bool avx512bf16() { return avx512vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif
};

// FASTRNN_SETS: a SET(name) for each set that is built, widest first (CMakeLists.txt).
std::vector<const InstructionSet*> runnable_sets() {
  std::vector<const InstructionSet*> sets;
#define SET(name) \
  if (Runs::name()) sets.push_back(&name##_set);
  FASTRNN_SETS
#undef SET
  return sets;
}

const InstructionSet& choose_set() {
  const auto sets = runnable_sets();
  const char* wanted = std::getenv("FASTRNN_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const InstructionSet* set : sets) {
    if (std::string(wanted) == set->name) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("FASTRNN_ISA: '" + std::string(wanted) +
                              "' is not an instruction set that this CPU runs; it runs " + names);
}

}  // namespace

const InstructionSet& chosen_set() {
  static const InstructionSet& set = choose_set();
  return set;
}

const char* cpu_isa() { return chosen_set().name; }

const char* cpu_int8_isa() {
  const InstructionSet* set = &chosen_set();
  while (!set->int8) set = set->base;
  return set->name;
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const InstructionSet* set : runnable_sets()) names.emplace_back(set->name);
  return names;
}

}  // namespace fastrnn
