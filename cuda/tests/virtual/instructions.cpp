// Implements each instruction for the lanes that execute it, according to the PTX ISA: those that
// nvcc uses for the kernels of this project. decode() throws for any other instruction.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <sstream>
#include <type_traits>

#include "machine.h"
#include "storage.h"

namespace fastrnn::virtual_device {
namespace {

using std::int16_t, std::int32_t, std::int64_t, std::uint16_t, std::uint32_t, std::uint64_t;

// ---- values in slots ----------------------------------------------------------------------------

template <class T>
T value(std::uint64_t slot) {
  T x;
  std::memcpy(&x, &slot, sizeof(T));
  return x;
}
template <class T>
std::uint64_t bits(T x) {
  std::uint64_t slot = 0;
  std::memcpy(&slot, &x, sizeof(T));
  return slot;
}

// A predicate is a slot that is zero or nonzero.
using Predicate = bool;

template <class F>
void for_lanes(const Warp& warp, const F& f) {
  if (warp.active == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (int lane = 0; lane < kLanes; ++lane)
      if (warp.active >> lane & 1u) f(lane);
  }
}

// The lanes' values of operand k.
template <class T>
struct Operand {
  std::uint64_t* slot;
  Operand(Warp& warp, const Instruction& in, int k)
      : slot(warp.slot(in.slots[static_cast<std::size_t>(k)])) {}
  T operator[](int lane) const {
    if constexpr (std::is_same_v<T, Predicate>)
      return slot[lane] != 0;
    else
      return value<T>(slot[lane]);
  }
  void set(int lane, T x) const { slot[lane] = bits<T>(x); }
};

// ---- arithmetic ---------------------------------------------------------------------------------

template <class R, class T, class F>
void unary(Warp& warp, const Instruction& in) {
  const Operand<R> to(warp, in, 0);
  const Operand<T> a(warp, in, 1);
  for_lanes(warp, [&](int lane) { to.set(lane, F()(a[lane])); });
}
template <class R, class T, class F>
void binary(Warp& warp, const Instruction& in) {
  const Operand<R> to(warp, in, 0);
  const Operand<T> a(warp, in, 1), b(warp, in, 2);
  for_lanes(warp, [&](int lane) { to.set(lane, F()(a[lane], b[lane])); });
}
// a and b have one type, c has the result's.
template <class R, class T, class F>
void ternary(Warp& warp, const Instruction& in) {
  const Operand<R> to(warp, in, 0);
  const Operand<T> a(warp, in, 1), b(warp, in, 2);
  const Operand<R> c(warp, in, 3);
  for_lanes(warp, [&](int lane) { to.set(lane, F()(a[lane], b[lane], c[lane])); });
}

template <class T>
struct Unsigned {
  using type = std::make_unsigned_t<T>;
};
template <>
struct Unsigned<float> {
  using type = float;
};
template <>
struct Unsigned<double> {
  using type = double;
};
template <>
struct Unsigned<bool> {
  using type = bool;
};
// Integers wrap around.
template <class T>
using Wrapping = typename Unsigned<T>::type;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wrapping<T>(a) + Wrapping<T>(b));
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wrapping<T>(a) - Wrapping<T>(b));
  }
};
struct Multiply {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a * b;
    else
      return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<__int128>(a) * b >> (8 * sizeof(T)));
  }
};
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>)
      if (b == T(0)) refuse("a division by zero");
    return static_cast<T>(a / b);
  }
};
// Within 2 ULP; zero for divisors above 2^126.
struct DivideApproximately {
  float operator()(float a, float b) const {
    if (std::fabs(b) > 0x1p126f && std::isfinite(b))
      return std::isinf(a) ? NAN : std::copysign(0.0f, a * b);
    return a / b;
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == T(0)) refuse("a division by zero");
    return static_cast<T>(a % b);
  }
};
// If one operand is NaN, the result is the other one.
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fmin(a, b);
    else
      return a < b ? a : b;
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return std::fmax(a, b);
    else
      return a > b ? a : b;
  }
};
struct FusedMultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct FusedMultiplyAddDown {
  float operator()(float a, float b, float c) const {
    // A product of floats is exact in double. The sum may round once, which can only matter for the
    // last bit of the float; the code below checks this case.
    const double exact = static_cast<double>(a) * b, sum = exact + c;
    const double lost = (exact - (sum - c)) + (c - (sum - (sum - c)));
    auto rounded = static_cast<float>(sum);
    if (static_cast<double>(rounded) > sum || (static_cast<double>(rounded) == sum && lost < 0))
      rounded = std::nextafter(rounded, -std::numeric_limits<float>::infinity());
    return rounded;
  }
};
struct MultiplyAdd {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(Multiply()(a, b), c);
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(-Wrapping<T>(a));
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
// PTX: the sign of a, the magnitude of b.
struct CopySign {
  template <class T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
struct Exponential2 {
  float operator()(float a) const { return std::exp2(a); }
};
struct Exponential2Flushed {
  float operator()(float a) const {
    const auto flushed = [](float x) {
      return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x;
    };
    return flushed(std::exp2(flushed(a)));
  }
};
struct Reciprocal {
  template <class T>
  T operator()(T a) const {
    return T(1) / a;
  }
};

// ---- bits ---------------------------------------------------------------------------------------

struct And {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};
struct Not {
  template <class T>
  T operator()(T a) const {
    if constexpr (std::is_same_v<T, bool>)
      return !a;
    else
      return static_cast<T>(~a);
  }
};

// Shifts by a 32-bit number; a shift by the type's width or more leaves only the sign.
template <class T, bool left>
void shift(Warp& warp, const Instruction& in) {
  const Operand<T> to(warp, in, 0), a(warp, in, 1);
  const Operand<std::uint32_t> by(warp, in, 2);
  constexpr std::uint32_t width = 8 * sizeof(T);
  for_lanes(warp, [&](int lane) {
    const std::uint32_t n = by[lane];
    T x = a[lane];
    if constexpr (left)
      x = n < width ? static_cast<T>(static_cast<std::make_unsigned_t<T>>(x) << n) : T(0);
    else
      x = static_cast<T>(n < width ? x >> n : (std::is_signed_v<T> && x < 0 ? -1 : 0));
    to.set(lane, x);
  });
}

// bfi to, a, b, position, length: a's lowest bits into b.
void insert_bits(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> to(warp, in, 0), a(warp, in, 1), b(warp, in, 2),
      position(warp, in, 3), length(warp, in, 4);
  for_lanes(warp, [&](int lane) {
    const std::uint64_t mask = ((1ull << (length[lane] & 255)) - 1) << (position[lane] & 255);
    to.set(lane, static_cast<std::uint32_t>(
                     (static_cast<std::uint64_t>(a[lane]) << (position[lane] & 255) & mask) |
                     (b[lane] & ~mask)));
  });
}

// prmt to, a, b, selectors: bytes of b and a, four of eight.
void permute_bytes(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> to(warp, in, 0), a(warp, in, 1), b(warp, in, 2), which(warp, in, 3);
  for_lanes(warp, [&](int lane) {
    const std::uint64_t all = static_cast<std::uint64_t>(b[lane]) << 32 | a[lane];
    std::uint32_t found = 0;
    for (int k = 0; k < 4; ++k) {
      const std::uint32_t selector = which[lane] >> (4 * k) & 15u;
      std::uint32_t byte = all >> (8 * (selector & 7u)) & 255u;
      if (selector & 8u) byte = byte & 128u ? 255u : 0u;  // replicates its sign
      found |= byte << (8 * k);
    }
    to.set(lane, found);
  });
}

// ---- moves and conversions ----------------------------------------------------------------------

// Moves a register, packs parts into one, or unpacks one into parts; `bytes` is the total width.
template <int bytes>
void move(Warp& warp, const Instruction& in) {
  const std::size_t count = in.slots.size();
  if (count == 2) {
    const Operand<std::uint64_t> to(warp, in, 0), from(warp, in, 1);
    for_lanes(warp, [&](int lane) { to.set(lane, from[lane]); });
    return;
  }
  const int parts = static_cast<int>(count) - 1, width = 8 * bytes / parts;
  const std::uint64_t mask = (1ull << width) - 1;
  for_lanes(warp, [&](int lane) {
    if (in.apart) {
      const std::uint64_t whole = Operand<std::uint64_t>(warp, in, parts)[lane];
      for (int k = 0; k < parts; ++k)
        Operand<std::uint64_t>(warp, in, k).set(lane, whole >> (width * k) & mask);
    } else {
      std::uint64_t whole = 0;
      for (int k = 0; k < parts; ++k)
        whole |= (Operand<std::uint64_t>(warp, in, k + 1)[lane] & mask) << (width * k);
      Operand<std::uint64_t>(warp, in, 0).set(lane, whole);
    }
  });
}

// selp to, a, b, predicate
void select(Warp& warp, const Instruction& in) {
  const Operand<std::uint64_t> to(warp, in, 0), a(warp, in, 1), b(warp, in, 2);
  const Operand<Predicate> first(warp, in, 3);
  for_lanes(warp, [&](int lane) { to.set(lane, first[lane] ? a[lane] : b[lane]); });
}

enum class Rounding { none, to_nearest_integer, saturated };

template <class To, class From, Rounding rounding>
void convert(Warp& warp, const Instruction& in) {
  const Operand<To> to(warp, in, 0);
  const Operand<From> a(warp, in, 1);
  for_lanes(warp, [&](int lane) {
    if constexpr (std::is_same_v<From, F16> || std::is_same_v<From, Bf16>) {
      to.set(lane, static_cast<To>(widen(a[lane])));
    } else if constexpr (std::is_same_v<To, F16> || std::is_same_v<To, Bf16>) {
      To narrowed;
      narrow(static_cast<float>(a[lane]), &narrowed);
      to.set(lane, narrowed);
    } else if constexpr (rounding == Rounding::to_nearest_integer) {
      to.set(lane, static_cast<To>(std::nearbyint(a[lane])));
    } else if constexpr (rounding == Rounding::saturated) {
      to.set(lane,
             std::isnan(a[lane]) ? To(0) : std::clamp(static_cast<To>(a[lane]), To(0), To(1)));
    } else {
      to.set(lane, static_cast<To>(a[lane]));
    }
  });
}

// ---- comparisons --------------------------------------------------------------------------------

enum class Compare { equal, different, less, less_or_equal, greater, greater_or_equal };

// `unordered`: true also if one operand is NaN.
template <class T, Compare how, bool unordered>
void compare(Warp& warp, const Instruction& in) {
  const Operand<Predicate> to(warp, in, 0);
  const Operand<T> a(warp, in, 1), b(warp, in, 2);
  for_lanes(warp, [&](int lane) {
    const T x = a[lane], y = b[lane];
    bool holds = false;
    if constexpr (std::is_floating_point_v<T>)
      if (std::isnan(x) || std::isnan(y)) return to.set(lane, unordered);
    switch (how) {
      case Compare::equal:
        holds = x == y;
        break;
      case Compare::different:
        holds = x != y;
        break;
      case Compare::less:
        holds = x < y;
        break;
      case Compare::less_or_equal:
        holds = x <= y;
        break;
      case Compare::greater:
        holds = x > y;
        break;
      case Compare::greater_or_equal:
        holds = x >= y;
        break;
    }
    to.set(lane, holds);
  });
}

// ---- memory -------------------------------------------------------------------------------------

enum class Space { parameter, global, shared };

template <Space space>
unsigned char* memory(Warp& warp, std::uint64_t address, std::size_t bytes) {
  if constexpr (space == Space::shared)
    return static_cast<unsigned char*>(shared_memory(*warp.block, address, bytes));
  if (address % bytes) refuse("an address is misaligned for " + std::to_string(bytes) + " bytes");
  if constexpr (space == Space::parameter) {
    // Parameters are read-only: the launch's copy does not change.
    const std::vector<unsigned char>& parameters = warp.block->launch->parameters;
    if (address + bytes > parameters.size()) refuse("an address beyond the parameters");
    return const_cast<unsigned char*>(parameters.data()) + address;
  }
  if (address < 4096) refuse("a null pointer");
  return reinterpret_cast<unsigned char*>(address);
}

template <Space space, int bytes, int count, bool sign>
void load(Warp& warp, const Instruction& in) {
  const Operand<std::uint64_t> address(warp, in, count);
  for_lanes(warp, [&](int lane) {
    const unsigned char* const from =
        memory<space>(warp, address[lane] + static_cast<std::uint64_t>(in.offset), bytes * count);
    for (int k = 0; k < count; ++k) {
      std::uint64_t found = 0;
      std::memcpy(&found, from + k * bytes, bytes);
      if (sign && bytes < 4 && found >> (8 * bytes - 1)) found |= ~0ull << (8 * bytes);
      Operand<std::uint64_t>(warp, in, k).set(lane, found);
    }
  });
}
template <Space space, int bytes, int count>
void store(Warp& warp, const Instruction& in) {
  const Operand<std::uint64_t> address(warp, in, 0);
  for_lanes(warp, [&](int lane) {
    unsigned char* const to =
        memory<space>(warp, address[lane] + static_cast<std::uint64_t>(in.offset), bytes * count);
    for (int k = 0; k < count; ++k) {
      const std::uint64_t x = Operand<std::uint64_t>(warp, in, k + 1)[lane];
      std::memcpy(to + k * bytes, &x, bytes);
    }
  });
}

void nothing(Warp&, const Instruction&) {}

// ---- the whole warp -----------------------------------------------------------------------------

// shfl.sync to|there, from, lane or mask, clamp, lanes
template <bool exclusive_or>
void shuffle(Warp& warp, const Instruction& in) {
  const bool tells = in.slots.size() == 6;
  const int first = tells ? 2 : 1;
  const Operand<std::uint64_t> from(warp, in, first);
  const Operand<std::uint32_t> which(warp, in, first + 1), clamp(warp, in, first + 2),
      lanes(warp, in, first + 3);
  std::uint64_t found[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes[lane] != kAllLanes || clamp[lane] != 31)
      refuse("a shuffle by only a part of the warp");
    const std::uint32_t other =
        exclusive_or ? static_cast<std::uint32_t>(lane) ^ which[lane] : which[lane];
    found[lane] = from[static_cast<int>(other & 31u)];
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    Operand<std::uint64_t>(warp, in, 0).set(lane, found[lane]);
    if (tells) Operand<Predicate>(warp, in, 1).set(lane, true);
  }
}

// The tensor cores' D = A·B + C, m16n8, k16 of 16-bit values or k8 of TF32, with the elements in
// the lanes as in "Matrix Fragments for mma.m16n8k16" and "… m16n8k8". Exact sums, rounded once.
template <class S>
void multiply_matrices(Warp& warp, const Instruction& in) {
  constexpr int per = sizeof(S) == 2 ? 2 : 1, K = 8 * per;
  const auto element = [&](int operand, int lane, int half) -> double {
    const std::uint64_t word = Operand<std::uint64_t>(warp, in, operand)[lane];
    if constexpr (per == 2)
      return widen(value<S>(word >> (16 * half)));
    else
      return value<float>(word & 0xffffe000u);  // TF32 has ten bits of mantissa
  };
  double a[16][K], b[K][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int group = lane / 4, place = lane % 4;
    for (int half = 0; half < per; ++half) {
      for (int k = 0; k < 4; ++k)  // words 0 and 2: row `group`; 1 and 3: eight rows further
        a[group + 8 * (k % 2)][place * per + half + 4 * per * (k / 2)] = element(4 + k, lane, half);
      for (int k = 0; k < 2; ++k)
        b[place * per + half + 4 * per * k][group] = element(8 + k, lane, half);
    }
  }
  float d[kLanes][4];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int n = 0; n < 4; ++n) {
      const int row = lane / 4 + 8 * (n / 2), column = lane % 4 * 2 + n % 2;
      double sum = Operand<float>(warp, in, 10 + n)[lane];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      d[lane][n] = static_cast<float>(sum);
    }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int n = 0; n < 4; ++n) Operand<float>(warp, in, n).set(lane, d[lane][n]);
}

// ---- clusters -----------------------------------------------------------------------------------

void cluster_arrive(Warp& warp, const Instruction&) {
  Cluster& cluster = *warp.block->cluster;
  if (warp.cluster_phase == cluster.phase) refuse("a second arrival at the cluster's barrier");
  warp.cluster_phase = cluster.phase;
  std::size_t warps = 0;
  for (const Block* const block : cluster.blocks) warps += block->warps.size();
  if (static_cast<std::size_t>(++cluster.arrived) == warps) ++cluster.phase, cluster.arrived = 0;
}
void cluster_wait(Warp& warp, const Instruction&) {
  if (warp.cluster_phase < 0) refuse("a wait at the cluster's barrier without an arrival");
  warp.again = warp.yields = warp.cluster_phase == warp.block->cluster->phase;
}

// mapa.shared::cluster to, address, rank
void map_address(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> to(warp, in, 0), address(warp, in, 1), rank(warp, in, 2);
  for_lanes(warp, [&](int lane) {
    if (rank[lane] >= warp.block->cluster->blocks.size())
      refuse("mapa: no such block in the cluster");
    to.set(lane, address[lane] | (rank[lane] + 1) << 24);
  });
}

void barrier_initialise(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> address(warp, in, 0), count(warp, in, 1);
  for_lanes(warp, [&](int lane) {
    Mbarrier(*warp.block, address[lane], false).initialise(static_cast<int>(count[lane]));
  });
}
// mbarrier.arrive.expect_tx _, [address], bytes
void barrier_expect(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> address(warp, in, 1);
  const Operand<std::int32_t> bytes(warp, in, 2);
  for_lanes(warp, [&](int lane) { Mbarrier(*warp.block, address[lane]).expect(bytes[lane]); });
}
// mbarrier.try_wait.parity complete, [address], parity
void barrier_try_wait(Warp& warp, const Instruction& in) {
  const Operand<Predicate> complete(warp, in, 0);
  const Operand<std::uint32_t> address(warp, in, 1), parity(warp, in, 2);
  for_lanes(warp, [&](int lane) {
    const bool is = Mbarrier(*warp.block, address[lane]).completed(parity[lane]);
    complete.set(lane, is);
    if (!is) warp.yields = true;
  });
}
// st.async [address], {words}, [barrier]
void send(Warp& warp, const Instruction& in) {
  const Operand<std::uint32_t> to(warp, in, 0), barrier(warp, in, 5);
  for_lanes(warp, [&](int lane) {
    Parcel parcel{to[lane], barrier[lane], {}};
    if (!(parcel.to >> 24) || !(parcel.barrier >> 24))
      refuse("st.async: an address outside the cluster");
    cluster_memory(*warp.block, parcel.to, 16);  // its size and alignment
    for (int k = 0; k < 4; ++k) parcel.words[k] = Operand<std::uint32_t>(warp, in, k + 1)[lane];
    warp.block->cluster->parcels.push_back(parcel);
  });
}

// ---- opcodes ------------------------------------------------------------------------------------

[[noreturn]] void unknown(const std::string& opcode) { refuse("'" + opcode + "' is unknown"); }

// Calls f(T()) with the type of PTX's name.
template <class F>
Execute of_integer(const std::string& name, const F& f) {
  if (name == "s16") return f(int16_t());
  if (name == "u16" || name == "b16") return f(uint16_t());
  if (name == "s32") return f(int32_t());
  if (name == "u32" || name == "b32") return f(uint32_t());
  if (name == "s64") return f(int64_t());
  if (name == "u64" || name == "b64") return f(uint64_t());
  unknown(name);
}
template <class F>
Execute of_float(const std::string& name, const F& f) {
  if (name == "f32") return f(float());
  if (name == "f64") return f(double());
  unknown(name);
}
template <class F>
Execute of_number(const std::string& name, const F& f) {
  return name[0] == 'f' ? of_float(name, f) : of_integer(name, f);
}

template <class F>
Execute binary_number(const std::string& type) {
  return of_number(type, [](auto x) { return &binary<decltype(x), decltype(x), F>; });
}
template <class F>
Execute binary_integer(const std::string& type) {
  return of_integer(type, [](auto x) { return &binary<decltype(x), decltype(x), F>; });
}
template <class F>
Execute binary_float(const std::string& type) {
  return of_float(type, [](auto x) { return &binary<decltype(x), decltype(x), F>; });
}
template <class F>
Execute binary_bits(const std::string& type) {
  if (type == "pred") return &binary<bool, bool, F>;
  return binary_integer<F>(type);
}
template <class F>
Execute unary_number(const std::string& type) {
  return of_number(type, [](auto x) { return &unary<decltype(x), decltype(x), F>; });
}
template <class F>
Execute unary_float(const std::string& type) {
  return of_float(type, [](auto x) { return &unary<decltype(x), decltype(x), F>; });
}

template <Compare how, bool unordered = false>
Execute comparison(const std::string& type) {
  return of_number(type, [](auto x) { return &compare<decltype(x), how, unordered>; });
}

int bytes_of(const std::string& type) { return std::atoi(type.c_str() + 1) / 8; }

template <Space space, int count>
Execute access(bool loads, int bytes, bool sign) {
  switch (bytes) {
    case 1:
      return loads ? (sign ? &load<space, 1, count, true> : &load<space, 1, count, false>)
                   : &store<space, 1, count>;
    case 2:
      return loads ? (sign ? &load<space, 2, count, true> : &load<space, 2, count, false>)
                   : &store<space, 2, count>;
    case 4:
      return loads ? &load<space, 4, count, false> : &store<space, 4, count>;
    case 8:
      return loads ? &load<space, 8, count, false> : &store<space, 8, count>;
    default:
      return nullptr;
  }
}
template <Space space>
Execute access(const std::string& opcode, bool loads, int count, const std::string& type) {
  const int bytes = bytes_of(type);
  const bool sign = type[0] == 's';
  Execute found = nullptr;
  if (count == 1) found = access<space, 1>(loads, bytes, sign);
  if (count == 2) found = access<space, 2>(loads, bytes, sign);
  if (count == 4 && bytes <= 4) found = access<space, 4>(loads, bytes, sign);
  if (!found) unknown(opcode);
  return found;
}

template <class From, Rounding rounding = Rounding::none>
Execute conversion_to(const std::string& type) {
  return of_number(type, [](auto x) { return &convert<decltype(x), From, rounding>; });
}

std::vector<std::string> parts_of(const std::string& opcode) {
  std::vector<std::string> parts;
  std::stringstream stream(opcode);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

Execute decode_conversion(const std::string& opcode, const std::vector<std::string>& parts) {
  const std::string &from = parts.back(), &to = parts[parts.size() - 2];
  const std::string how = parts.size() > 3 ? parts[1] : "";
  if (from == "f16" && how.empty()) return conversion_to<F16>(to);
  if (from == "bf16" && how.empty()) return conversion_to<Bf16>(to);
  if (how == "rn" && to == "f16" && from == "f32") return &convert<F16, float, Rounding::none>;
  if (how == "rn" && to == "bf16" && from == "f32") return &convert<Bf16, float, Rounding::none>;
  if (how == "rni" && from == "f32") return conversion_to<float, Rounding::to_nearest_integer>(to);
  if (how == "sat" && to == "f32" && from == "f32")
    return &convert<float, float, Rounding::saturated>;
  const bool exact = how.empty() && from[0] != 'f' && to[0] != 'f';
  const bool rounded = how == "rn" && to[0] == 'f' && from[0] != 'f';
  if (!exact && !rounded) unknown(opcode);
  return of_number(from, [&](auto x) { return conversion_to<decltype(x)>(to); });
}

Execute decode_comparison(const std::string& opcode, const std::string& how,
                          const std::string& type) {
  const bool is_signed = type[0] == 's' || type[0] == 'f';
  if (how == "eq") return comparison<Compare::equal>(type);
  if (how == "ne") return comparison<Compare::different>(type);
  if (how == "lt") return comparison<Compare::less>(type);
  if (how == "le") return comparison<Compare::less_or_equal>(type);
  if (how == "gt") return comparison<Compare::greater>(type);
  if (how == "ge") return comparison<Compare::greater_or_equal>(type);
  if (!is_signed || type[0] == 's') unknown(opcode);
  if (how == "equ") return comparison<Compare::equal, true>(type);
  if (how == "neu") return comparison<Compare::different, true>(type);
  if (how == "ltu") return comparison<Compare::less, true>(type);
  if (how == "leu") return comparison<Compare::less_or_equal, true>(type);
  if (how == "gtu") return comparison<Compare::greater, true>(type);
  if (how == "geu") return comparison<Compare::greater_or_equal, true>(type);
  unknown(opcode);
}

// ld and st, including the ring's relaxed accesses: here every store is visible immediately.
Execute decode_access(const std::string& opcode, const std::vector<std::string>& parts) {
  const bool loads = parts[0] == "ld";
  std::size_t at = 1;
  if (parts[at] == "relaxed" && parts[at + 1] == "gpu") at += 2;
  const std::string& space = parts[at++];
  int count = 1;
  if (parts[at][0] == 'v') count = std::atoi(parts[at++].c_str() + 1);
  if (at + 1 != parts.size()) unknown(opcode);
  if (space == "param" && loads) return access<Space::parameter>(opcode, loads, count, parts[at]);
  if (space == "global") return access<Space::global>(opcode, loads, count, parts[at]);
  if (space == "shared") return access<Space::shared>(opcode, loads, count, parts[at]);
  unknown(opcode);
}

Execute decode_multiplication(const std::string& opcode, const std::vector<std::string>& parts) {
  const std::string &how = parts[1], &type = parts.back();
  if (how == "rn") return binary_float<Multiply>(type);
  if (how == "lo") return binary_integer<Multiply>(type);
  if (how == "hi")
    return of_integer(type, [](auto x) { return &binary<decltype(x), decltype(x), MultiplyHigh>; });
  if (how == "wide" && type == "s32") {
    struct Wide {
      int64_t operator()(int32_t a, int32_t b) const { return static_cast<int64_t>(a) * b; }
    };
    return &binary<int64_t, int32_t, Wide>;
  }
  if (how == "wide" && type == "u32") {
    struct Wide {
      uint64_t operator()(uint32_t a, uint32_t b) const { return static_cast<uint64_t>(a) * b; }
    };
    return &binary<uint64_t, uint32_t, Wide>;
  }
  unknown(opcode);
}

// Instructions without a type, or with only one type, by their full name.
Execute decode_whole(const std::string& opcode, Kind* kind) {
  struct Known {
    const char* opcode;
    Execute run;
    Kind kind;
  };
  static constexpr Known all[] = {
      {"bra", nothing, Kind::branch},
      {"bra.uni", nothing, Kind::branch},
      {"ret", nothing, Kind::leave},
      {"bar.sync", nothing, Kind::block_barrier},
      {"bar.warp.sync", nothing, Kind::together},
      {"shfl.sync.bfly.b32", shuffle<true>, Kind::together},
      {"shfl.sync.idx.b32", shuffle<false>, Kind::together},
      {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", multiply_matrices<Bf16>,
       Kind::together},
      {"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", multiply_matrices<F16>, Kind::together},
      {"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", multiply_matrices<float>,
       Kind::together},
      {"barrier.cluster.arrive.release.aligned", cluster_arrive, Kind::together},
      {"barrier.cluster.wait.acquire.aligned", cluster_wait, Kind::together},
      {"mapa.shared::cluster.u32", map_address, Kind::plain},
      {"mbarrier.init.shared::cta.b64", barrier_initialise, Kind::plain},
      {"mbarrier.arrive.expect_tx.shared::cta.b64", barrier_expect, Kind::plain},
      {"mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64", barrier_try_wait, Kind::plain},
      {"st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32", send, Kind::plain},
      {"fence.mbarrier_init.release.cluster", nothing, Kind::plain},
      {"fence.acq_rel.gpu", nothing, Kind::plain},
      {"prefetch.global.L2", nothing, Kind::plain},
      {"bfi.b32", insert_bits, Kind::plain},
      {"prmt.b32", permute_bytes, Kind::plain},
      {"div.approx.f32", &binary<float, float, DivideApproximately>, Kind::plain},
      {"ex2.approx.f32", &unary<float, float, Exponential2>, Kind::plain},
      {"ex2.approx.ftz.f32", &unary<float, float, Exponential2Flushed>, Kind::plain},
      {"fma.rm.f32", &ternary<float, float, FusedMultiplyAddDown>, Kind::plain},
      {"rcp.rn.f64", &unary<double, double, Reciprocal>, Kind::plain},
  };
  for (const Known& known : all)
    if (opcode == known.opcode) {
      *kind = known.kind;
      return known.run;
    }
  return nullptr;
}

Execute decode_typed(const std::string& opcode, const std::vector<std::string>& parts) {
  const std::string &base = parts[0], &type = parts.back();
  const bool rounds = parts.size() == 3 && parts[1] == "rn";
  const bool plain = parts.size() == 2 || rounds;
  if (base == "ld" || base == "st") return decode_access(opcode, parts);
  if (base == "cvt") return decode_conversion(opcode, parts);
  if (base == "mul") return decode_multiplication(opcode, parts);
  if (base == "setp" && parts.size() == 3) return decode_comparison(opcode, parts[1], type);
  if (base == "mad" && parts[1] == "lo")
    return of_integer(type, [](auto x) { return &ternary<decltype(x), decltype(x), MultiplyAdd>; });
  if (base == "fma" && rounds)
    return of_float(type,
                    [](auto x) { return &ternary<decltype(x), decltype(x), FusedMultiplyAdd>; });
  if (base == "cvta") return &move<8>;  // global and generic addresses are host addresses
  if (!plain) unknown(opcode);
  if (base == "add") return binary_number<Add>(type);
  if (base == "sub") return binary_number<Subtract>(type);
  if (base == "div" && (rounds || type[0] != 'f')) return binary_number<Divide>(type);
  if (base == "rem") return binary_integer<Remainder>(type);
  if (base == "min") return binary_number<Least>(type);
  if (base == "max") return binary_number<Greatest>(type);
  if (base == "neg") return unary_number<Negate>(type);
  if (base == "abs") return unary_float<Absolute>(type);
  if (base == "copysign") return binary_float<CopySign>(type);
  if (base == "and") return binary_bits<And>(type);
  if (base == "or") return binary_bits<Or>(type);
  if (base == "xor") return binary_bits<Xor>(type);
  if (base == "not" && type == "pred") return &unary<bool, bool, Not>;
  if (base == "not")
    return of_integer(type, [](auto x) { return &unary<decltype(x), decltype(x), Not>; });
  if (base == "shl") return of_integer(type, [](auto x) { return &shift<decltype(x), true>; });
  if (base == "shr") return of_integer(type, [](auto x) { return &shift<decltype(x), false>; });
  if (base == "selp") return &select;
  if (base == "mov" && type == "pred") return &move<8>;
  if (base == "mov") return bytes_of(type) == 8 ? &move<8> : &move<4>;
  unknown(opcode);
}

}  // namespace

void decode(const std::string& opcode, Instruction* in) {
  in->run = decode_whole(opcode, &in->kind);
  if (!in->run) in->run = decode_typed(opcode, parts_of(opcode));
}

}  // namespace fastrnn::virtual_device
