// The choice of the persistent kernel on a device like an H200, and the reasons if there is none.
#include "persistent/plan.h"

#include <cstdio>
#include <string>
#include <vector>

#include "../../../csrc/tests/check.h"

namespace {

using namespace fastrnn;
using namespace fastrnn::persistent;

long checks = 0;

// The kernels of kernels.cuh for an LSTM with a 16-bit operand, forward.
const Kernel kLstm[] = {
    {"LSTM", OperandKind::bfloat16, Pass::forward, {Via::block, 2, 4, 8, 4, 0, 1}, 4, 2, nullptr},
    {"LSTM", OperandKind::bfloat16, Pass::forward, {Via::cluster, 2, 4, 2, 4, 0, 1}, 4, 2, nullptr},
    {"LSTM", OperandKind::bfloat16, Pass::forward, {Via::ring, 2, 4, 1, 4, 0, 2}, 4, 2, nullptr},
    {"LSTM", OperandKind::bfloat16, Pass::forward, {Via::ring, 2, 4, 1, 4, 4, 1}, 4, 2, nullptr},
};

Plan plan(int B, int H, const DeviceFacts& d, int groups = 1) {
  const Sizes s{"LSTM", OperandKind::bfloat16, Pass::forward, 100, B, H, groups};
  return choose_kernel(s, d, kLstm, 4);
}

void expect(const char* what, bool holds, const Plan& p) {
  ++checks;
  check::context() = p.why;
  check::that(what, holds);
}

// Every row belongs to one team, all units to its blocks, and the launch to the device.
void expect_whole(const Plan& p, int B, int H, int groups, const DeviceFacts& d) {
  if (!p.kernel) return;
  const Team& t = p.team;
  const RuntimeConfig& c = p.kernel->config;
  expect("rows",
         t.teams_per_group * t.rows_per_team >= B && (t.teams_per_group - 1) * t.rows_per_team < B,
         p);
  expect("units", t.blocks * c.tiles * kUnits >= H, p);
  expect("passes", t.passes * c.batch * kRows >= t.rows_per_team, p);
  expect("weights", t.chunks <= c.chunks() * c.slices(), p);
  expect("shared memory", p.shared_bytes <= d.shared_bytes, p);
  expect("blocks", p.blocks == groups * t.teams_per_group * t.blocks, p);
  if (c.via == Via::ring) {
    expect("resident", p.blocks <= d.multiprocessors, p);
    expect("workspace", p.workspace_bytes >= std::size_t(message_bytes(t)) * kEpochs, p);
  } else {
    expect("no workspace", p.workspace_bytes == 0, p);
  }
}

void regimes() {
  const DeviceFacts d = h200();
  const auto via = [&](int B, int H) { return plan(B, H, d).kernel->config.via; };
  expect("a block for many rows of 128 units", via(1024, 128) == Via::block, plan(1024, 128, d));
  expect("a cluster for 256", via(16, 256) == Via::cluster, plan(16, 256, d));
  expect("the ring for 768", via(16, 768) == Via::ring, plan(16, 768, d));
  expect("two teams of 64 for 1024", plan(16, 1024, d).team.teams_per_group == 2,
         plan(16, 1024, d));
  expect("one team of 128 for 2048", plan(16, 2048, d).blocks == 128, plan(16, 2048, d));
  expect("two directions side by side", plan(8, 1024, d, 2).blocks == 128, plan(8, 1024, d, 2));
}

void refusals() {
  DeviceFacts d = h200();
  const auto refused = [&](const Plan& p, const char* why) {
    expect(why, !p.kernel && p.why == why, p);
  };
  refused(plan(16, 2200, d), "more blocks than multiprocessors");
  refused(plan(0, 128, d), "an empty problem");
  d.cooperative = false;
  refused(plan(16, 1024, d), "the device has no cooperative launches");
  d = h200();
  d.clusters_of_16 = d.clusters_of_8 = 0;
  expect("without clusters no cluster", plan(16, 256, d).kernel->config.via == Via::ring,
         plan(16, 256, d));
  d = h200();
  d.compute_major = 8;
  d.clusters_of_16 = d.clusters_of_8 = 0;
  expect("sm_80 has the ring", plan(16, 512, d).kernel->config.via == Via::ring, plan(16, 512, d));
  d.multiprocessors = 7;  // a slice of a shared device
  refused(plan(16, 1024, d), "more blocks than multiprocessors");
  const Sizes gru{"GRU", OperandKind::bfloat16, Pass::forward, 10, 4, 64, 1};
  refused(choose_kernel(gru, h200(), kLstm, 4), "no persistent kernel of this cell and type");
}

}  // namespace

int main() {
  const DeviceFacts d = h200();
  for (const int H : {1, 16, 65, 128, 129, 256, 320, 512, 513, 768, 1000, 1024, 1536, 2048, 2112})
    for (const int B : {1, 8, 9, 16, 33, 64, 128, 256, 1000})
      for (const int groups : {1, 2}) expect_whole(plan(B, H, d, groups), B, H, groups, d);
  regimes();
  refusals();
  return check::result("persistent plan", checks);
}
