// The CUDA keywords and functions that the kernels of csrc/cuda use, for the host compiler. Each thread of a kernel is
// a fiber. A fiber runs until it waits at a barrier, a shuffle or an atomic. Then another one continues, which a seed
// determines. So every test run detects wrong indices, missing barriers and results that depend on the order. Fibers
// are sequentially consistent, so a missing fence between blocks is not detected.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>

#include "runtime.h"

#define BNKERN_ISA on_host  // the scalar conversions of the CPU kernels
#include "../../../csrc/cpu/storage.h"
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
  bool resident;  // all blocks run at once
};

// Runs `body`, the kernel with its arguments, once for every thread. Returns "" or an error. Only one launch runs at a
// time. Threads of the host wait for each other, and may alternate between launches (pause_between_launches).
std::string run(const Grid& grid, const void* kernel, const std::function<void()>& body);
// Whether all blocks can be resident at once, with the limit of configure().
bool fits(const Grid& grid);

// The indices of the running fiber.
struct Place {
  dim3 thread, block, block_size, grid_size;
};
const Place& place();

char* shared_memory();
void block_barrier();
int block_barrier_or(int value);
// The two halves of a barrier. A fiber must not arrive twice, wait before it arrives, or end between the halves.
void arrive_in_cluster();
void wait_in_cluster();
char* of_cluster_block(char* p, unsigned rank);
unsigned cluster_rank();
unsigned atomic_add(unsigned* word, unsigned value);
unsigned poll(const unsigned* word);
// All lanes of the warp in `mask` pass a value each. Returns the values of all lanes; those of other lanes are noise.
using LaneValue = std::array<std::uint64_t, 3>;
using WarpValues = std::array<LaneValue, 32>;
std::shared_ptr<const WarpValues> all_lanes(unsigned mask, const LaneValue& own);
unsigned ballot(unsigned mask, bool value);
unsigned lane();

// Notes that the running thread loads an operand of a matrix product, 8 bytes, from this address in shared memory.
void note_operand(const char* p);
template <class T>
T load_operand(const char* p) {
  static_assert(sizeof(T) == 8);
  note_operand(p);
  return *reinterpret_cast<const T*>(p);
}

template <class T>
T shuffled(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = (*all_lanes(mask, {bits}))[lane % 32][0];
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

#include "multiply_add.h"

#define threadIdx (cuda_on_cpu::place().thread)
#define blockIdx (cuda_on_cpu::place().block)
#define blockDim (cuda_on_cpu::place().block_size)
#define gridDim (cuda_on_cpu::place().grid_size)

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline int __syncthreads_or(int value) { return cuda_on_cpu::block_barrier_or(value); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::all_lanes(mask, {}); }
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
