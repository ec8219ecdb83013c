// The CUDA backend compiled by nvcc, host code and PTX, on the virtual device, compared with the
// CPU engine: random stacks in every storage type, with step kernels and with persistent kernels,
// and the same bits in every order of blocks, warps and messages. Also tests the errors that the
// virtual device must report.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../persistent/tests/reference.h"
#include "../cases.h"
#include "cuda_info.h"
#include "device.h"
#include "persistent.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::cases;
using virtual_device::device;
using virtual_device::Order;

const Backend& virtual_backend() {
  static constexpr Backend backend =
      backend_of([](const Problem& p, Pass pass) { return cuda_backend().workspace_size(p, pass); },
                 [](const Problem& p) {
                   cuda_backend().forward(p);
                   virtual_device::synchronize();
                 },
                 [](const Problem& p) {
                   cuda_backend().backward(p);
                   virtual_device::synchronize();
                 });
  return backend;
}

// ---- the backend --------------------------------------------------------------------------------

template <class S>
void check_case(const char* type, const Case& c, Random& random, double tolerance) {
  check::context() = std::string(type) + " " + c.text();
  Arrays<S> expected = random_arrays<S>(c, random), got = expected;
  run_reference(c, expected);
  for (const Order order : {Order::in_turn, Order::shuffled}) {
    Arrays<S> again = expected;
    device().order = order;
    run(virtual_backend(), c, again);
    if (order == Order::in_turn)
      got = again, compare_all(c, got, expected, tolerance);
    else
      same_bits_of_all(c, got, again);
  }
}

template <class S>
void check_type(const char* type, double tolerance, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 100 + (tolerance > 1e-2));
  for (int k = 0; k < cases; ++k)
    check_case<S>(type, random_case(random, tolerance > 1e-3, k % 8 == 7), random, tolerance);
  std::printf("%s: %d cases, %d failures so far\n", type, cases, check::failures());
}

template <class S>
bool has_persistent(const Case& c, Pass pass) {
  Arrays<S> none;
  Problem p = problem_of(c, none);
  const std::vector<Parameters> parameters(size_of(c.L() * c.D()));
  p.parameters = parameters.data();
  return cuda_kernels(p, pass).persistent;
}

template <class S>
void check_persistent_type(const char* type, double tolerance, bool tf32, int cases) {
  Random random(static_cast<unsigned>(sizeof(S)) * 1000 + tf32 + (tolerance > 1e-2));
  long forward = 0, backward = 0;
  for (int k = 0; k < cases; ++k) {
    Case c = random_case(random, true, false);
    c.persistent = true, c.tf32 = tf32;
    c.options.proj_size = 0, c.options.maths.reset_after = true;
    // Sizes for one block, for a cluster and for a ring of several blocks.
    if (c.options.maths.heads == 1) c.H = between(random, 1, 1 + 30 * (k % 4));
    if (c.B == 0) c.B = 1, choose_rows(c, kPadded, random);
    forward += has_persistent<S>(c, Pass::forward);
    backward += c.training && has_persistent<S>(c, Pass::backward);
    check_case<S>(type, c, random, tolerance);
  }
  check::context() = type;
  ++checks;
  check::that("most have persistent kernels", 2 * forward > cases && backward > 0);
  std::printf("%s, persistent: %d cases, %d failures so far\n", type, cases, check::failures());
}

// ---- each persistent kernel ---------------------------------------------------------------------

persistent::DeviceFacts facts() {
  persistent::DeviceFacts d = persistent::h200();
  d.cache_bytes = 1 << 16;  // short epochs of the ring
  return d;
}

// The kernel that a pass takes: the one under test, or any.
persistent::Plan plan_of(const persistent::Sizes& sizes, const persistent::Kernel& tested) {
  int count = 0;
  const persistent::Kernel* const all = persistent::kernels(&count);
  const persistent::Plan plan = tested.pass == sizes.pass
                                    ? plan_for(tested, sizes, facts())
                                    : choose_kernel(sizes, facts(), all, count);
  if (!plan.kernel) return plan;
  cudaFuncSetAttribute(plan.kernel->function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       plan.shared_bytes);
  cudaFuncSetAttribute(plan.kernel->function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return plan;
}

template <class Cell, class Operand>
void check_kernel(const persistent::Kernel& tested, int T, int B, int H, unsigned seed) {
  using namespace persistent;
  Trial<Cell, Operand> p;
  p.T = T, p.B = B, p.H = H;
  p.groups = H < 100 ? 2 : 1, p.reverse_from = 1;
  persistent::choose_rows(p, seed % 2 == 0, seed % 3 != 1, seed);
  fill(p, seed);
  Sizes sizes{Cell::name, kind_of<Operand>, Pass::forward, T, B, H, p.groups};
  const Plan forth = plan_of(sizes, tested);
  sizes.pass = Pass::backward;
  const Plan back = plan_of(sizes, tested);
  const bool goes_back =
      tested.pass == Pass::backward || back.kernel;  // there may be none so large
  check::context() = p.text() + ", forward: " + forth.why + ", backward: " + back.why;
  ++checks;
  if (!check::that("a plan", forth.kernel && (back.kernel || !goes_back))) return;

  std::vector<unsigned char> ring(std::max(forth.workspace_bytes, back.workspace_bytes) + 16);
  void* const aligned = reinterpret_cast<void*>(
      (reinterpret_cast<std::uintptr_t>(ring.data()) + 15) & ~std::uintptr_t{15});
  const StepTable steps = table_of(p);
  device().order = seed % 2 ? Order::shuffled : Order::in_turn;
  launch_forward(forth, forward_arrays(p, steps, true, in_place), aligned, nullptr);
  virtual_device::synchronize();
  if (goes_back) launch_backward(back, backward_arrays(p, steps, in_place), aligned, nullptr);
  virtual_device::synchronize();
  checks += persistent::compare(p, Reference<Cell, Operand>(p).run(), goes_back);
}

// Where the weights fill the registers and go on in shared memory, or the largest that the
// device has room for.
int large_size(const persistent::Kernel& k) {
  const int fields = k.pass == Pass::forward ? 1 : k.gates;
  const int full = k.config.slices() * (k.config.registers + (k.config.shared > 0)) *
                   persistent::kChunk * k.config.per_word / fields;
  int H = full - 3;  // an odd size, in the last chunk
  while (H > 8 && !plan_for(k, {k.cell, k.operand, k.pass, 2, 3, H, 1}, facts()).kernel) H -= 8;
  return H;
}

template <class Cell, class Operand>
void check_kernels(const char* operand) {
  int count = 0, found = 0;
  const persistent::Kernel* const all = persistent::kernels(&count);
  for (int i = 0; i < count; ++i) {
    const persistent::Kernel& k = all[i];
    if (std::strcmp(k.cell, Cell::name) || k.operand != persistent::kind_of<Operand>) continue;
    ++found;
    check_kernel<Cell, Operand>(k, 40, 11, 21, 6);
    check_kernel<Cell, Operand>(k, 2, 3, large_size(k), 5);
  }
  ++checks;
  check::that("eight kernels of each cell and operand", found == 8);
  std::printf("%s, %s: %d kernels, %d failures so far\n", Cell::name, operand, found,
              check::failures());
}

template <class Cell>
void check_cell() {
  check_kernels<Cell, persistent::BFloat16>("bfloat16");
  check_kernels<Cell, persistent::Float16>("float16");
  check_kernels<Cell, persistent::Tf32>("TF32");
  check_kernels<Cell, persistent::Float32>("3xTF32");
}

// ---- the virtual device -------------------------------------------------------------------------

// Runs a kernel with one parameter, a structure of 64 bytes whose first word is the address of
// `out`.
std::string outcome(const std::string& code, std::uint32_t* out, int blocks = 1, int cluster = 1) {
  const std::string text =
      ".version 9.0\n.target sm_90a\n.visible .entry kernel(\n\t.param .align 8 .b8 "
      "given[64]\n)\n{\n"
      "\t.reg .pred %p<9>;\n\t.reg .b32 %r<9>;\n\t.reg .b64 %rd<9>;\n"
      "\t.shared .align 8 .b8 memory[128];\n\tld.param.u64 %rd1, [given];\n\tmov.u32 %r1, %tid.x;\n"
      "\tmul.wide.u32 %rd2, %r1, 4;\n\tadd.s64 %rd2, %rd1, %rd2;\n" +
      code + "\tret;\n}\n";
  try {
    const virtual_device::Module module(text);
    virtual_device::Launch launch;
    launch.function = &module.function("kernel");
    launch.parameters.resize(64);
    std::memcpy(launch.parameters.data(), &out, sizeof(out));
    launch.blocks = blocks, launch.cluster = cluster, launch.threads = 64, launch.most_turns = 1000;
    std::mt19937 random(1);
    virtual_device::run(launch, Order::shuffled, random);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void check_device() {
  check::context() = "the virtual device";
  alignas(16) std::uint32_t out[64] = {};
  const auto refuses = [&](const char* what, const std::string& code, const char* with) {
    ++checks;
    const std::string got = outcome(code, out);
    check::that((std::string(what) + ": " + got).c_str(), got.find(with) != std::string::npos);
  };
  refuses("a misaligned vector", "ld.global.v2.u32 {%r2, %r3}, [%rd1+4];\n", "misaligned");
  refuses("shared memory out of bounds", "mov.u32 %r2, 128;\nst.shared.u32 [%r2], %r1;\n",
          "byte 128 of 128");
  refuses("a null pointer", "mov.u64 %rd3, 0;\nld.global.u32 %r2, [%rd3];\n", "null pointer");
  refuses("an unknown instruction", "popc.b32 %r2, %r1;\n", "'popc.b32' is unknown");
  refuses("a shuffle by only a part of the warp",
          "setp.lt.s32 %p1, %r1, 5;\n@%p1 bra $there;\n"
          "shfl.sync.idx.b32 %r2|%p2, %r1, 0, 31, -1;\nbra.uni $end;\n"
          "$there:\nshfl.sync.idx.b32 %r2|%p2, %r1, 0, 31, -1;\n$end:\n",
          "wait for each other at different instructions");
  refuses("a barrier that half of the block skips",
          "setp.lt.s32 %p1, %r1, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:\n",
          "has ended before a barrier");
  refuses("a barrier that is not initialised",
          "mov.u32 %r2, memory;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, "
          "[%r2], 0;\n",
          "is not initialised");
  refuses("an endless wait", "bar.sync 0;\n$again:\nbra.uni $again;\n", "does not end");

  const auto computes = [&](const char* what, const std::string& code, int blocks, auto expected) {
    std::memset(out, 0xff, sizeof(out));
    const std::string got = outcome(code, out, blocks, blocks);
    ++checks;
    if (!check::that((std::string(what) + ": " + got).c_str(), got.empty())) return;
    for (int i = 0; i < 64; ++i, ++checks) check::close(what, out[i], expected(i), 0);
  };
  computes("lanes that diverge and reconverge",
           "setp.lt.s32 %p1, %r1, 7;\nmov.u32 %r2, 0;\n$more:\nadd.s32 %r2, %r2, 1;\n"
           "setp.le.s32 %p2, %r2, %r1;\n@%p2 bra $more;\n@!%p1 bra $end;\nadd.s32 %r2, %r2, 100;\n"
           "$end:\nshfl.sync.bfly.b32 %r3|%p3, %r2, 1, 31, -1;\nst.global.u32 [%rd2], %r3;\n",
           1, [](int i) { return (i ^ 1) + 1 + ((i ^ 1) < 7 ? 100 : 0); });
  computes("lanes that wait for others ahead of them",
           "and.b32 %r2, %r1, 1;\nsetp.eq.s32 %p1, %r2, 0;\n@%p1 bra $ahead;\n"
           "$wait:\nld.relaxed.gpu.global.u32 %r3, [%rd2+-4];\nsetp.eq.s32 %p2, %r3, -1;\n"
           "@%p2 bra $wait;\nst.global.u32 [%rd2], %r3;\nbra.uni $end;\n"
           "$ahead:\nst.relaxed.gpu.global.u32 [%rd2], %r1;\n$end:\n",
           1, [](int i) { return i & ~1; });
  // Each block sends its threads' numbers plus 1000 times its own number to the other block.
  computes("messages in a cluster",
           "mov.u32 %r2, memory;\nadd.s32 %r3, %r2, 64;\nmov.u32 %r4, %ctaid.x;\n"
           "setp.ne.s32 %p1, %r1, 0;\n@%p1 bra $ready;\n"
           "mbarrier.init.shared::cta.b64 [%r3], 1;\n"
           "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 64;\n$ready:\n"
           "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
           "setp.gt.s32 %p2, %r1, 3;\n@%p2 bra $sent;\nxor.b32 %r5, %r4, 1;\n"
           "mad.lo.s32 %r6, %r4, 1000, %r1;\nshl.b32 %r7, %r1, 4;\nadd.s32 %r7, %r2, %r7;\n"
           "mapa.shared::cluster.u32 %r7, %r7, %r5;\nmapa.shared::cluster.u32 %r8, %r3, %r5;\n"
           "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r7], "
           "{%r6, %r6, %r6, %r6}, [%r8];\n$sent:\n"
           "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3], 0;\n"
           "@!%p3 bra $sent;\nsetp.ne.s32 %p4, %r4, 1;\n@%p4 bra $end;\nand.b32 %r5, %r1, 15;\n"
           "shl.b32 %r5, %r5, 2;\nadd.s32 %r5, %r5, %r2;\nld.shared.u32 %r6, [%r5];\n"
           "st.global.u32 [%rd2], %r6;\n$end:\nbarrier.cluster.arrive.release.aligned;\n"
           "barrier.cluster.wait.acquire.aligned;\n",
           2, [](int i) { return i % 16 / 4; });
}

}  // namespace

// virtual_test device | kernels | steps [PERCENT] | persistent [PERCENT]: runs PERCENT of the
// random cases, by default all.
int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "device";
  const int percent = count > 2 ? std::atoi(arguments[2]) : 100;
  try {
    if (what == "device") {
      check_device();
    } else if (what == "kernels") {
      device().multiprocessors = facts().multiprocessors;
      device().at_once = false;
      check_cell<Lstm>();
      check_cell<Gru>();
      check_cell<Elman>();
    } else if (what == "steps") {
      // The products of the library double run immediately, not in a queue.
      const char* const library = std::getenv("FASTRNN_CUBLASLT");
      device().at_once = library && std::strcmp(library, "none");
      check_type<double>("float64", 1e-12, 60 * percent / 100);
      check_type<float>("float32", 1e-5, 60 * percent / 100);
      check_type<Bf16>("bfloat16", 2e-2, 60 * percent / 100);
      check_type<F16>("float16", 4e-3, 60 * percent / 100);
    } else {
      device().at_once = false;
      check_persistent_type<float>("float32", 3e-5, false, 20 * percent / 100);
      check_persistent_type<float>("tf32", 8e-3, true, 20 * percent / 100);
      check_persistent_type<Bf16>("bfloat16", 2e-2, false, 20 * percent / 100);
      check_persistent_type<F16>("float16", 4e-3, false, 20 * percent / 100);
    }
  } catch (const std::exception& error) {
    check::that(error.what(), false);
  }
  std::printf("%ld launches, %ld of clusters, %ld cooperative\n", device().launches,
              device().cluster_launches, device().cooperative_launches);
  return check::result("virtual_test", checks);
}
