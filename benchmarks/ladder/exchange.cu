// Measures the assumptions behind the persistent kernels' estimates:
//
//   1. one exchange of the state among 64 and all multiprocessors: with data that is its own flag
//      (cuda/persistent/ring.h), with a flag barrier, with grid.sync; in µs and clocks per step
//   2. bytes per clock through distributed shared memory, for clusters of 8 and 16: each block
//   reads
//      the whole cluster's memory, or the blocks use asynchronous stores with a barrier
//   3. the number of clusters of 8 and 16 blocks that run concurrently with all shared memory
//   4. whether a launch can be cooperative with clusters, and captured in a graph
//
// Usage: exchange [FILE.json]. In a step each block writes 16 units of 8 rows in 16 bits (256
// bytes) and reads the data of all blocks, as the ring's kernels do.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "persistent/machine.cuh"
#include "persistent/ring.h"

namespace {

using namespace fastrnn::resident;

// ---- output: rows of a table, and the same as JSON ----------------------------------------------

// Exits if a call failed, with the name of the call.
void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// The exit code if there is no device, which is not a failure of the program.
constexpr int kNoDevice = 77;

bool has_device() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0) return true;
  std::printf("no CUDA device on this machine: nothing measured\n");
  return false;
}

class Report {
 public:
  void add(const std::string& what, double value, const std::string& unit) {
    rows_.push_back({what, unit, value, ""});
    std::printf("%-64s %12.4g %s\n", what.c_str(), value, unit.c_str());
    std::fflush(stdout);
  }
  void note(const std::string& what, const std::string& text) {
    rows_.push_back({what, "", 0, text});
    std::printf("%-64s %s\n", what.c_str(), text.c_str());
    std::fflush(stdout);
  }
  // A list of {"what", "value", "unit"} or {"what", "text"}.
  void write(const char* path) const {
    std::FILE* const file = std::fopen(path, "w");
    if (!file) {
      std::fprintf(stderr, "%s: cannot be written\n", path);
      std::exit(1);
    }
    std::fprintf(file, "[\n");
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const Row& r = rows_[i];
      if (!r.text.empty())
        std::fprintf(file, "  {\"what\": \"%s\", \"text\": \"%s\"}", r.what.c_str(),
                     r.text.c_str());
      else if (std::isfinite(r.value))
        std::fprintf(file, "  {\"what\": \"%s\", \"value\": %.9g, \"unit\": \"%s\"}",
                     r.what.c_str(), r.value, r.unit.c_str());
      else
        std::fprintf(file, "  {\"what\": \"%s\", \"text\": \"not a number\"}", r.what.c_str());
      std::fprintf(file, "%s\n", i + 1 < rows_.size() ? "," : "");
    }
    std::fprintf(file, "]\n");
    std::fclose(file);
  }

 private:
  struct Row {
    std::string what, unit;
    double value;
    std::string text;
  };
  std::vector<Row> rows_;
};

// The median of a few timed runs, in milliseconds; one untimed run first.
template <class Run>
double median_ms(Run run, int runs = 5) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  run();
  for (int i = 0; i < runs; ++i) {
    check(cudaEventRecord(start), "cudaEventRecord");
    run();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "a timed run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end), "cudaEventElapsedTime");
    times.push_back(ms);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// ---- the measurements ---------------------------------------------------------------------------

constexpr int kBlockWords = 64;
constexpr int kSteps = 4000;

enum class Method { data_is_flag, flag_barrier, grid_sync };

// At every step a thread mixes what it has read into what it writes, so the compiler keeps the
// reads.
__device__ u32 mixed(u32 sum) { return (sum * 2654435761u) >> 1; }  // never the sentinel

__device__ void step_ring(CudaMachine& machine, const Ring& ring, int message, int blocks,
                          u32& sum) {
  const u32* const words = ring.slot(message);
  for (int i = 4 * static_cast<int>(threadIdx.x); i < blocks * kBlockWords; i += 4 * kThreads) {
    Words w;
    while (!arrived(w = machine.load(words + i))) machine.waiting();
    sum += w.v[0] + w.v[1] + w.v[2] + w.v[3];
  }
}

__global__ void __launch_bounds__(kThreads, 1) exchange_ring(Ring ring, int blocks, u32* out) {
  CudaMachine machine{nullptr};
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t mine = static_cast<std::int64_t>(blockIdx.x) * kBlockWords + thread;
  u32 sum = blockIdx.x + threadIdx.x;
  for (int m = 0; m < kSteps; ++m) {
    begin_message(machine, ring, m);
    if (thread < kBlockWords) publish(machine, ring, m, mine, mixed(sum));
    step_ring(machine, ring, m, blocks, sum);
    __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <Method method>
__global__ void __launch_bounds__(kThreads, 1)
    exchange_barrier(u32* words, unsigned* counter, int blocks, u32* out) {
  CudaMachine machine{nullptr};
  const int thread = static_cast<int>(threadIdx.x);
  const int size = blocks * kBlockWords;
  u32 sum = blockIdx.x + threadIdx.x;
  for (int m = 0; m < kSteps; ++m) {
    u32* const slot = words + (m & 1) * size;
    if (thread < kBlockWords) machine.store(slot + blockIdx.x * kBlockWords + thread, mixed(sum));
    if (method == Method::grid_sync) {
      cooperative_groups::this_grid().sync();
    } else {
      __syncthreads();
      if (thread == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
        const unsigned all = static_cast<unsigned>(m + 1) * static_cast<unsigned>(blocks);
        while (*static_cast<volatile unsigned*>(counter) < all) machine.waiting();
        __threadfence();
      }
      __syncthreads();
    }
    for (int i = 4 * thread; i < size; i += 4 * kThreads) {
      const Words w = machine.load(slot + i);
      sum += w.v[0] + w.v[1] + w.v[2] + w.v[3];
    }
  }
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

void launch(const void* kernel, int blocks, void** arguments, bool cooperative, int cluster,
            int shared, cudaStream_t stream, cudaError_t* status) {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2]{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = stream;
  config.attrs = attributes;
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    auto& size = attributes[config.numAttrs++].val.clusterDim;
    size.x = static_cast<unsigned>(cluster), size.y = size.z = 1;
  }
  *status = cudaLaunchKernelExC(&config, kernel, arguments);
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), "cudaDeviceGetAttribute");
  return value;
}

template <class T>
T* allocate(std::size_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)), "cudaMalloc");
  return static_cast<T*>(memory);
}

void add_step(Report& report, const std::string& what, double ms) {
  report.add(what, ms * 1e3 / kSteps, "us a step");
}

// 1. ----------------------------------------------------------------------------------------------

void exchanges(Report& report, int blocks) {
  u32* const out = allocate<u32>(static_cast<std::size_t>(blocks) * kThreads);
  const std::string at = std::to_string(blocks) + " blocks";
  for (const int period : {1, 8, 32}) {
    Ring ring;
    ring.period = period;
    ring.message_words = static_cast<std::int64_t>(blocks) * kBlockWords;
    const auto bytes = static_cast<std::size_t>(kEpochs * period * ring.message_words) * 4;
    ring.words = allocate<u32>(bytes / 4);
    void* arguments[] = {&ring, &blocks, const_cast<u32**>(&out)};
    const double ms = median_ms([&] {
      cudaError_t status;
      check(cudaMemsetAsync(ring.words, 0xff, bytes), "cudaMemsetAsync");
      launch(reinterpret_cast<const void*>(&exchange_ring), blocks, arguments, true, 1, 0, nullptr,
             &status);
      check(status, "the exchange by the ring");
    });
    add_step(report, "exchange, data is its flag, epochs of " + std::to_string(period) + ", " + at,
             ms);
    cudaFree(ring.words);
  }
  u32* const words = allocate<u32>(static_cast<std::size_t>(2 * blocks * kBlockWords));
  unsigned* const counter = allocate<unsigned>(1);
  void* arguments[] = {const_cast<u32**>(&words), const_cast<unsigned**>(&counter), &blocks,
                       const_cast<u32**>(&out)};
  const auto time = [&](const void* kernel) {
    return median_ms([&] {
      cudaError_t status;
      check(cudaMemsetAsync(counter, 0, sizeof(unsigned)), "cudaMemsetAsync");
      launch(kernel, blocks, arguments, true, 1, 0, nullptr, &status);
      check(status, "the exchange by a barrier");
    });
  };
  add_step(report, "exchange, flag barrier, " + at,
           time(reinterpret_cast<const void*>(&exchange_barrier<Method::flag_barrier>)));
  add_step(report, "exchange, grid.sync, " + at,
           time(reinterpret_cast<const void*>(&exchange_barrier<Method::grid_sync>)));
  cudaFree(words);
  cudaFree(counter);
  cudaFree(out);
}

// 2. ----------------------------------------------------------------------------------------------

constexpr int kClusterWords = 8192;  // 32 KiB of each block
constexpr int kRounds = 200;

__device__ int cluster_blocks() {
  unsigned count;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(count));
  return static_cast<int>(count);
}

// Each block repeatedly reads the 32 KiB of every block of its cluster.
__global__ void __launch_bounds__(kThreads, 1) read_cluster(long long* clocks, u32* out) {
  extern __shared__ Words memory[];
  CudaMachine machine{reinterpret_cast<unsigned char*>(memory)};
  for (int i = static_cast<int>(threadIdx.x); i < kClusterWords / 4; i += kThreads)
    memory[i] = Words{{static_cast<u32>(i), 1, 2, 3}};
  machine.cluster_sync();
  const int blocks = cluster_blocks();
  u32 sum = 0;
  const long long start = clock64();
  for (int round = 0; round < kRounds; ++round)
    for (int block = 0; block < blocks; ++block) {
      const int from = (block + static_cast<int>(blockIdx.x)) % blocks;
      const u32 base = CudaMachine::address_of(from, memory);
#pragma unroll
      for (int i = 0; i < kClusterWords / 4 / kThreads; ++i) {
        u32 a, b, c, d;
        asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "r"(base + 16u * (static_cast<u32>(i) * kThreads + threadIdx.x)));
        sum += a + b + c + d;
      }
    }
  machine.cluster_sync();
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

// Each block sends 1 KiB to every block and waits for the data of all blocks: one cluster exchange.
__global__ void __launch_bounds__(kThreads, 1) send_cluster(long long* clocks, u32* out) {
  extern __shared__ Words memory[];
  __shared__ Barrier barriers[2];
  CudaMachine machine{reinterpret_cast<unsigned char*>(memory)};
  const int blocks = cluster_blocks(), thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(blockIdx.x) % blocks;
  const int bytes = blocks * 1024;
  if (thread == 0)
    for (int m = 0; m < 2; ++m) {
      machine.barrier_init(barriers + m);
      machine.barrier_expect(barriers + m, bytes);
    }
  machine.cluster_sync();
  u32 sum = threadIdx.x;
  const long long start = clock64();
  for (int m = 0; m < kRounds; ++m) {
    u32* const buffer = reinterpret_cast<u32*>(memory) + (m & 1) * blocks * 256;
    const Words words{{sum, sum, sum, sum}};
    for (int block = thread / 64; block < blocks; block += kThreads / 64)
      machine.send(block, buffer + rank * 256 + thread % 64 * 4, words, barriers + (m & 1));
    machine.barrier_wait(barriers + (m & 1), phase_parity(m));
    if (thread == 0 && m + 2 < kRounds) machine.barrier_expect(barriers + (m & 1), bytes);
    for (int i = thread; i < blocks * 64; i += kThreads)
      sum += reinterpret_cast<const Words*>(buffer)[i].v[0];
    __syncthreads();
  }
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - start;
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
  machine.cluster_sync();
}

// The clocks of the slowest block; a negative number, with a note, if the launch fails.
double cluster_clocks(Report& report, const void* kernel, int cluster, int clusters,
                      const std::string& what) {
  const int blocks = cluster * clusters, shared = kClusterWords * 4;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        what.c_str());
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        what.c_str());
  long long* clocks = allocate<long long>(static_cast<std::size_t>(blocks));
  u32* out = allocate<u32>(static_cast<std::size_t>(blocks) * kThreads);
  void* arguments[] = {&clocks, &out};
  double slowest = -1;
  for (int run = 0; run < 3; ++run) {  // the last one counts
    cudaError_t status;
    launch(kernel, blocks, arguments, false, cluster, shared, nullptr, &status);
    if (status != cudaSuccess) {
      cudaGetLastError();
      report.note(what, cudaGetErrorString(status));
      break;
    }
    check(cudaDeviceSynchronize(), what.c_str());
    std::vector<long long> got(static_cast<std::size_t>(blocks));
    check(cudaMemcpy(got.data(), clocks, got.size() * sizeof(long long), cudaMemcpyDeviceToHost),
          what.c_str());
    slowest = 0;
    for (const long long c : got) slowest = std::fmax(slowest, static_cast<double>(c));
  }
  cudaFree(clocks);
  cudaFree(out);
  return slowest;
}

void clusters(Report& report, int cluster, int most) {
  if (most < 1) return;
  for (const int count : {1, most}) {
    const std::string at =
        "clusters of " + std::to_string(cluster) + ", " + std::to_string(count) + " at once";
    const double read = cluster_clocks(report, reinterpret_cast<const void*>(&read_cluster),
                                       cluster, count, "reads, " + at);
    if (read > 0)
      report.add("distributed shared memory, reads, " + at,
                 double(kRounds) * cluster * kClusterWords * 4 / read, "bytes a clock and block");
    const double sent = cluster_clocks(report, reinterpret_cast<const void*>(&send_cluster),
                                       cluster, count, "exchange, " + at);
    if (sent > 0) report.add("exchange of 1 KiB a block, " + at, sent / kRounds, "clocks a step");
    if (count == most) break;
  }
}

// 3. and 4. ---------------------------------------------------------------------------------------

int clusters_at_once(int cluster, int shared) {
  const auto kernel = reinterpret_cast<const void*>(&read_cluster);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "shared");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "clusters");
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[1]{};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.attrs = attributes;
  config.numAttrs = 1;
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) cudaGetLastError();
  return count;
}

// Each block increments a counter twice around a grid barrier, which ends only with co-residency.
__global__ void __launch_bounds__(kThreads, 1) meet(unsigned* counter, unsigned* out) {
  if (threadIdx.x == 0) atomicAdd(counter, 1u);
  cooperative_groups::this_grid().sync();
  if (threadIdx.x == 0) out[blockIdx.x] = *static_cast<volatile unsigned*>(counter);
}

std::string launches(int blocks, int cluster, bool cooperative, bool captured) {
  const auto kernel = reinterpret_cast<const void*>(&meet);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "clusters");
  unsigned* counter = allocate<unsigned>(1);
  unsigned* out = allocate<unsigned>(static_cast<std::size_t>(blocks));
  void* arguments[] = {&counter, &out};
  cudaStream_t stream;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  cudaError_t status = cudaSuccess;
  const auto work = [&] {
    check(cudaMemsetAsync(counter, 0, sizeof(unsigned), stream), "cudaMemsetAsync");
    launch(kernel, blocks, arguments, cooperative, cluster, 0, stream, &status);
  };
  if (captured) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    work();
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (status == cudaSuccess) status = ended;
    if (status == cudaSuccess) status = cudaGraphInstantiate(&ready, graph, 0);
    if (status == cudaSuccess) status = cudaGraphLaunch(ready, stream);
  } else {
    work();
  }
  if (status == cudaSuccess) status = cudaStreamSynchronize(stream);
  std::string result = status == cudaSuccess ? "works" : cudaGetErrorString(status);
  cudaGetLastError();
  if (status == cudaSuccess) {
    std::vector<unsigned> got(static_cast<std::size_t>(blocks));
    check(cudaMemcpy(got.data(), out, got.size() * sizeof(unsigned), cudaMemcpyDeviceToHost),
          "copy");
    for (const unsigned seen : got)
      if (seen != static_cast<unsigned>(blocks)) result = "runs, but a block continued too early";
  }
  cudaStreamDestroy(stream);
  cudaFree(counter);
  cudaFree(out);
  return result;
}

}  // namespace

int main(int count, char** arguments) {
  if (!has_device()) return kNoDevice;
  Report report;
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  const int all = attribute(cudaDevAttrMultiProcessorCount);
  report.note("device", properties.name);
  report.add("multiprocessors", all, "");
  report.add("L2", attribute(cudaDevAttrL2CacheSize) / 1048576.0, "MiB");
  exchanges(report, all < 64 ? all : 64);
  if (all > 64) exchanges(report, all);
  if (attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
    const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - 1024;
    for (const int cluster : {8, 16}) {
      const int fit = clusters_at_once(cluster, most);
      report.add("clusters of " + std::to_string(cluster) + " that run at once", fit, "");
      clusters(report, cluster, fit);
      if (!fit) continue;
      for (const bool captured : {false, true})
        report.note(std::string("cooperative, clusters of ") + std::to_string(cluster) +
                        (captured ? ", captured" : ""),
                    launches(cluster * fit, cluster, true, captured));
    }
  }
  for (const bool captured : {false, true})
    report.note(std::string("cooperative") + (captured ? ", captured" : ""),
                launches(all, 1, true, captured));
  if (count > 1) report.write(arguments[1]);
  return 0;
}
