// Streams and events are made once and kept for later calls: a call takes a set of them for the
// time in which it issues its work, so that no other thread records its events. Nothing waits on
// the host. What a set's streams still have to do when the next call takes it comes first, as in
// any stream.
//
// Under graph capture a set's streams belong to the capture until that ends, longer than the call.
// So a call takes only a set whose streams are captured by nobody, or by the capture that the
// caller's stream is in.
#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "side_streams.h"
#include "status.h"

namespace fastrnn::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  require(status, "the streams of a stack's layers: ", what);
}

// A stream, and the event that says how far it is.
struct Side {
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;

  Side() {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "an event");
    if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess) return;
    const cudaError_t failed = cudaGetLastError();
    cudaEventDestroy(event);
    check(failed, "a stream");
  }
  ~Side() {
    if (stream) cudaStreamDestroy(stream);
    if (event) cudaEventDestroy(event);
  }
  Side(Side&& other) noexcept
      : stream(std::exchange(other.stream, nullptr)), event(std::exchange(other.event, nullptr)) {}
  Side& operator=(Side&&) = delete;
};

struct Set {
  int device = 0;
  cudaEvent_t start = nullptr;
  std::vector<Side> sides;

  explicit Set(int of) : device(of) {
    check(cudaEventCreateWithFlags(&start, cudaEventDisableTiming), "an event");
  }
  ~Set() {
    if (start) cudaEventDestroy(start);
  }
  Set(const Set&) = delete;
};

// The capture that a stream is in; 0: none.
unsigned long long capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(stream, &status, &id), "whether a graph captures");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

bool usable(const Set& set, unsigned long long capture) {
  for (const Side& side : set.sides) {
    const unsigned long long own = capture_of(side.stream);
    if (own && own != capture) return false;
  }
  return true;
}

// The sets that no call has at the moment. Never destroyed: the driver may be gone before.
struct Pool {
  std::mutex mutex;
  std::vector<std::unique_ptr<Set>> idle;
};
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

// While it lives, calls that a capture forbids to this thread are allowed: a new stream is none of
// its work.
struct Relaxed {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

std::unique_ptr<Set> take(cudaStream_t caller, int count) {
  const Relaxed relaxed;
  int device = 0;
  check(cudaGetDevice(&device), "the current device");
  const unsigned long long capture = capture_of(caller);
  std::unique_ptr<Set> set;
  {
    Pool& all = pool();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (auto it = all.idle.begin(); it != all.idle.end() && !set; ++it)
      if ((*it)->device == device && usable(**it, capture)) {
        set = std::move(*it);
        all.idle.erase(it);
        break;
      }
  }
  if (!set) set = std::make_unique<Set>(device);
  while (static_cast<int>(set->sides.size()) < count) set->sides.emplace_back();
  return set;
}

}  // namespace

int multiprocessors() {
  int device = 0, count = 0;
  const bool found =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  if (!found) cudaGetLastError();  // read, so that a later call does not meet it
  return found ? count : 0;
}

struct SideStreams::Streams {
  cudaStream_t caller;
  int count;
  std::unique_ptr<Set> set;
  int begun = 0;  // so many follow the caller's stream, and have to be joined
};

SideStreams::SideStreams(void* caller, int count)
    : streams_(new Streams{static_cast<cudaStream_t>(caller), count, nullptr}) {
  Streams& s = *streams_;
  s.set = take(s.caller, count);
  check(cudaEventRecord(s.set->start, s.caller), "where the caller's stands");
  cudaError_t failed = cudaSuccess;
  for (; s.begun < count && failed == cudaSuccess; ++s.begun)
    failed = cudaStreamWaitEvent(s.set->sides[static_cast<std::size_t>(s.begun)].stream,
                                 s.set->start, 0);
  if (failed == cudaSuccess) return;
  join();
  check(failed, "waiting for the caller's");
}

SideStreams::~SideStreams() {
  try {
    join();
  } catch (const std::runtime_error&) {  // what went wrong before has been told
  }
  Pool& all = pool();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.idle.push_back(std::move(streams_->set));
}

void* SideStreams::stream(int k) const {
  return streams_->set->sides[static_cast<std::size_t>(k)].stream;
}

void SideStreams::wait(int k, int before) {
  const std::vector<Side>& sides = streams_->set->sides;
  const Side& first = sides[static_cast<std::size_t>(before)];
  check(cudaEventRecord(first.event, first.stream), "how far a layer is");
  check(cudaStreamWaitEvent(sides[static_cast<std::size_t>(k)].stream, first.event, 0),
        "waiting for the layer below");
}

void SideStreams::join() {
  Streams& s = *streams_;
  cudaError_t failed = cudaSuccess;
  while (s.begun > 0) {  // all of them, whatever one says
    const Side& side = s.set->sides[static_cast<std::size_t>(--s.begun)];
    cudaError_t status = cudaEventRecord(side.event, side.stream);
    if (status == cudaSuccess) status = cudaStreamWaitEvent(s.caller, side.event, 0);
    if (status != cudaSuccess) failed = status;
  }
  check(failed, "the caller's waiting for them");
}

}  // namespace fastrnn::cuda
