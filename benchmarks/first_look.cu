// Two costs that decide between one kernel and two, on the device at hand: nvcc -std=c++20 -arch=sm_90.
//   launch   microseconds of one launch within a replayed graph: an empty kernel; a cooperative one with one barrier
//            between all blocks; one with clusters of 8 that meet once; two empty ones in a row
//   copy     GB/s, read plus written, of a copy of 1 to 16 MB that stays in the second-level cache, and of 1 GB
// One JSON object a line.
#include <cstdio>
#include <cstdlib>

#include "../csrc/cuda/exchange.h"

namespace {

using namespace bnkern;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

__global__ void empty_kernel() {}
__global__ void barrier_kernel(unsigned* word) { barrier_of_blocks(word, gridDim.x, blockIdx.x == 0); }
__global__ void cluster_kernel() { cluster_barrier(); }
__global__ void copy_kernel(const Words* from, Words* to, std::int64_t count) {
  constexpr int kUnroll = 4;
  const std::int64_t step = std::int64_t(gridDim.x) * blockDim.x;
  std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + (kUnroll - 1) * step < count; i += kUnroll * step) {
    Words words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) words[u] = load_words(from + i + u * step);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) store_words(to + i + u * step, words[u]);
  }
  for (; i < count; i += step) store_words(to + i, load_words(from + i));
}

// Microseconds of one of `times` calls within a graph, the median of 21 replays.
template <class F>
double replayed(int times, F queue) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t ready;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < times; ++i) {
    const std::string error = queue(reinterpret_cast<std::uintptr_t>(stream));
    if (!error.empty()) std::fprintf(stderr, "%s\n", error.c_str()), std::exit(1);
  }
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&ready, graph, 0));
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  constexpr int kRounds = 21;
  float milliseconds[kRounds];
  for (int round = -3; round < kRounds; ++round) {
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(ready, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    if (round >= 0) check(cudaEventElapsedTime(&milliseconds[round], start, end));
  }
  for (int i = 1; i < kRounds; ++i)
    for (int j = i; j > 0 && milliseconds[j] < milliseconds[j - 1]; --j) std::swap(milliseconds[j], milliseconds[j - 1]);
  return 1e3 * milliseconds[kRounds / 2] / times;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  const unsigned blocks = device.multiProcessorCount;
  unsigned* word;
  check(cudaMalloc(&word, sizeof(unsigned)));
  check(cudaMemset(word, 0, sizeof(unsigned)));
  const auto empty = [&](std::uintptr_t stream) { return launch({"empty", blocks, 512, 0, stream}, empty_kernel); };
  const auto barrier = [&](std::uintptr_t stream) -> std::string {
    std::string error;
    if (!launch_resident({"barrier", blocks, 512, 0, stream}, &error, barrier_kernel, word)) return "not resident";
    return error;
  };
  const auto cluster = [&](std::uintptr_t stream) -> std::string {
    std::string error;
    if (!launch_clusters({"cluster", blocks / 8 * 8, 512, 0, stream, 8}, &error, cluster_kernel)) return "no clusters";
    return error;
  };
  const auto two = [&](std::uintptr_t stream) { return empty(stream) + empty(stream); };
  std::printf("{\"what\": \"launch\", \"device\": \"%s\", \"blocks\": %u, \"empty_us\": %.3f, ", device.name, blocks,
              replayed(200, empty));
  std::printf("\"barrier_us\": %.3f, \"two_us\": %.3f, ", replayed(200, barrier), replayed(200, two));
  if (device.major >= 9) {
    std::printf("\"cluster_us\": %.3f}\n", replayed(200, cluster));
  } else {
    std::printf("\"cluster_us\": null}\n");
  }
  std::fflush(stdout);
  Words *from, *to;
  constexpr std::int64_t kMost = std::int64_t(1) << 30;
  check(cudaMalloc(&from, kMost));
  check(cudaMalloc(&to, kMost));
  check(cudaMemset(from, 1, kMost));
  for (const std::int64_t bytes : {1ll << 20, 2ll << 20, 4ll << 20, 8ll << 20, 16ll << 20, 1ll << 30}) {
    const double us = replayed(bytes == kMost ? 2 : 100, [&](std::uintptr_t stream) {
      return launch({"copy", blocks * 4, 512, 0, stream}, copy_kernel, static_cast<const Words*>(from), to,
                    bytes / std::int64_t(sizeof(Words)));
    });
    std::printf("{\"what\": \"copy\", \"bytes\": %lld, \"us\": %.3f, \"gb_per_s\": %.0f}\n",
                static_cast<long long>(bytes), us, 2e-3 * bytes / us);
    std::fflush(stdout);
  }
}
