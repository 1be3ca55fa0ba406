// The CUDA words that the kernels of csrc/cuda use, for the host compiler. Each thread of a kernel is a fiber; a fiber
// runs until it waits, at a barrier, a shuffle or an atomic, and then another one, drawn by a seed, goes on. So wrong
// indices, missing barriers and results that depend on order show in any test run. What cannot show: fibers are
// sequentially consistent, so a fence that is missing between blocks is not missed here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "runtime.h"

#define BNKERN_ISA on_host  // the scalar conversions of the CPU kernels
#include "../../csrc/cpu/storage.h"
#undef BNKERN_ISA

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace cuda_on_cpu {

struct Grid {
  const char* name;
  dim3 blocks, threads;
  std::size_t shared_bytes;
  unsigned cluster;
  bool resident;  // all blocks at once
};

// Runs `body`, which is the kernel with its arguments, once for every thread: "" or what went wrong. One launch at a
// time: threads of the host wait for each other, and may take turns between two launches (pause_between_launches).
std::string run(const Grid& grid, const void* kernel, const std::function<void()>& body);
// Whether all its blocks can be resident at once: as many as configure() said.
bool fits(const Grid& grid);

// Where the running fiber is.
struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& place();

char* shared_memory();
void block_barrier();
int block_barrier_or(int value);
void cluster_barrier();
char* of_cluster_block(char* p, unsigned rank);
unsigned cluster_rank();
unsigned atomic_add(unsigned* word, unsigned value);
unsigned poll(const unsigned* word);
// All lanes of the warp named in `mask` give 8 bytes each; gives those of `lane`, which is taken modulo 32.
std::uint64_t exchange(unsigned mask, std::uint64_t value, unsigned lane);
unsigned ballot(unsigned mask, bool value);
unsigned lane();

template <class T>
T shuffled(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using bnkern::on_host::widen;
template <class T>
std::uint32_t pack_two(float first, float second) {
  T low, high;
  bnkern::on_host::narrow(first, &low);
  bnkern::on_host::narrow(second, &high);
  return low.bits | std::uint32_t{high.bits} << 16;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::place().thread)
#define blockIdx (cuda_on_cpu::place().block)
#define blockDim (cuda_on_cpu::place().block_size)
#define gridDim (cuda_on_cpu::place().grid_size)

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline int __syncthreads_or(int value) { return cuda_on_cpu::block_barrier_or(value); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::exchange(mask, 0, 0); }
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return cuda_on_cpu::shuffled(mask, value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes) {
  return cuda_on_cpu::shuffled(mask, value, cuda_on_cpu::lane() ^ lanes);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes) {
  const unsigned from = cuda_on_cpu::lane() + lanes;
  return cuda_on_cpu::shuffled(mask, value, from < 32 ? from : cuda_on_cpu::lane());
}
inline unsigned __ballot_sync(unsigned mask, bool value) { return cuda_on_cpu::ballot(mask, value); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
