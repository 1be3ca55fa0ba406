// The only way a kernel is launched, and the words kernels use that are not C++: a .cu file includes no other CUDA
// header. Compiled by nvcc they mean the GPU. Compiled by the host compiler they mean tests/backends/cuda_on_cpu, which
// runs every thread of a kernel as a fiber: the sources are the same, and every word that is PTX below has its twin
// there, as has every function of the CUDA runtime that launch.cu and workspaces.cu call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cuda_on_cpu.h>
#endif

#include "../dtype.h"

namespace bnkern {

// ------------------------------------------------------------------------------------------------- on the host

struct Launch {
  const char* name;  // of the phase, for the error text
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes;
  std::uintptr_t stream;  // a cudaStream_t of the current device
  unsigned cluster = 1;   // blocks of a cluster, neighbours along x
};

// "name: CUDA's words", or "" where nothing went wrong.
std::string error_text(const char* name, cudaError_t error);

// Lets a kernel have as much dynamic shared memory as a block of the current device can get. It is set once for each
// kernel and device: a limit that fits one launch would be lowered by the next, perhaps by another thread's before
// this one is queued. Kernels have no static shared memory, which would count towards it.
cudaError_t allow_shared_memory(const void* kernel);

namespace detail {
// What must be set before a kernel is queued with so much shared memory.
inline cudaError_t prepare(const Launch& settings, const void* kernel) {
  return settings.shared_bytes > (48 << 10) ? allow_shared_memory(kernel) : cudaSuccess;
}
}  // namespace detail

#ifdef __CUDACC__

namespace detail {
template <class... Params, class... Args>
cudaError_t queue(const Launch& settings, bool cooperative, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = settings.blocks;
  config.blockDim = settings.threads;
  config.dynamicSmemBytes = settings.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(settings.stream);
  config.attrs = attributes;
  if (cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (settings.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {settings.cluster, 1, 1};
  }
  cudaError_t error = prepare(settings, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess && settings.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // the error is reported here, not by whoever asks CUDA next
  return error;
}
}  // namespace detail

// Queues kernel(args...) and returns at once: "" or why it could not be queued. What goes wrong while
// the kernel runs is reported by the stream's next synchronisation, as for any kernel.
template <class... Params, class... Args>
std::string launch(const Launch& settings, void (*kernel)(Params...), Args&&... args) {
  return error_text(settings.name, detail::queue(settings, false, kernel, std::forward<Args>(args)...));
}

// The same with all blocks resident at once, so that they may wait for one another. False, and nothing queued, where
// the device cannot hold them now: under a process's share of it that may be fewer than it holds alone.
template <class... Params, class... Args>
bool launch_resident(const Launch& settings, std::string* error, void (*kernel)(Params...), Args&&... args) {
  const cudaError_t code = detail::queue(settings, true, kernel, std::forward<Args>(args)...);
  if (code == cudaErrorCooperativeLaunchTooLarge || code == cudaErrorInvalidClusterSize) return false;
  *error = error_text(settings.name, code);
  return true;
}

// The same in clusters. False, and nothing queued, where the device has no room for one.
template <class... Params, class... Args>
bool launch_clusters(const Launch& settings, std::string* error, void (*kernel)(Params...), Args&&... args) {
  const cudaError_t code = detail::queue(settings, false, kernel, std::forward<Args>(args)...);
  if (code == cudaErrorInvalidClusterSize || code == cudaErrorLaunchOutOfResources) return false;
  *error = error_text(settings.name, code);
  return true;
}

#else

template <class... Params, class... Args>
std::string launch(const Launch& settings, void (*kernel)(Params...), Args&&... args) {
  if (const auto error = detail::prepare(settings, reinterpret_cast<const void*>(kernel)); error != cudaSuccess)
    return error_text(settings.name, error);
  return cuda_on_cpu::run(
      {settings.name, settings.blocks, settings.threads, settings.shared_bytes, settings.cluster, false},
      reinterpret_cast<const void*>(kernel), [&] { kernel(args...); });
}

template <class... Params, class... Args>
bool launch_resident(const Launch& settings, std::string* error, void (*kernel)(Params...), Args&&... args) {
  const cuda_on_cpu::Grid grid{settings.name,         settings.blocks,  settings.threads,
                               settings.shared_bytes, settings.cluster, true};
  if (!cuda_on_cpu::fits(grid)) return false;
  const cudaError_t prepared = detail::prepare(settings, reinterpret_cast<const void*>(kernel));
  *error = prepared == cudaSuccess
               ? cuda_on_cpu::run(grid, reinterpret_cast<const void*>(kernel), [&] { kernel(args...); })
               : error_text(settings.name, prepared);
  return true;
}

template <class... Params, class... Args>
bool launch_clusters(const Launch& settings, std::string* error, void (*kernel)(Params...), Args&&... args) {
  const cuda_on_cpu::Grid cluster{settings.name,         settings.cluster, settings.threads,
                                  settings.shared_bytes, settings.cluster, true};
  if (!cuda_on_cpu::fits(cluster)) return false;
  *error = launch(settings, kernel, std::forward<Args>(args)...);
  return true;
}

#endif

// ------------------------------------------------------------------------------------------------- in a kernel

// What a thread loads or stores at once.
struct alignas(16) Words {
  std::uint32_t word[4];
};

#ifdef __CUDACC__
#define BNKERN_DEVICE __device__ __forceinline__
extern __shared__ Words bnkern_shared[];
#else
#define BNKERN_DEVICE inline
#endif

// The block's shared memory, as many bytes as its launch asked for: the one way to it. It begins with noise.
template <class A>
BNKERN_DEVICE A* shared_memory(std::size_t offset = 0) {
#ifdef __CUDACC__
  return reinterpret_cast<A*>(reinterpret_cast<char*>(bnkern_shared) + offset);
#else
  return reinterpret_cast<A*>(cuda_on_cpu::shared_memory() + offset);
#endif
}

// 16 bytes of a tensor that this kernel does not write; they are not kept in the first-level cache.
BNKERN_DEVICE Words load_words(const void* p) {
#ifdef __CUDACC__
  Words v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(p));
  return v;
#else
  return *static_cast<const Words*>(p);
#endif
}

BNKERN_DEVICE void store_words(void* p, Words v) { *static_cast<Words*>(p) = v; }

// Two values rounded to nearest even; the first in the lower half.
BNKERN_DEVICE std::uint32_t pack_two(float first, float second, BFloat16*) {
#ifdef __CUDACC__
  std::uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
  return two;
#else
  return cuda_on_cpu::pack_two<BFloat16>(first, second);
#endif
}
BNKERN_DEVICE std::uint32_t pack_two(float first, float second, Float16*) {
#ifdef __CUDACC__
  std::uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(second), "f"(first));
  return two;
#else
  return cuda_on_cpu::pack_two<Float16>(first, second);
#endif
}

BNKERN_DEVICE float widen(float value) { return value; }
BNKERN_DEVICE float widen(BFloat16 value) {
#ifdef __CUDACC__
  return __uint_as_float(std::uint32_t(value.bits) << 16);
#else
  return cuda_on_cpu::widen(value);
#endif
}
BNKERN_DEVICE float widen(Float16 value) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#else
  return cuda_on_cpu::widen(value);
#endif
}

// ---- order between blocks: for exchange.h alone

BNKERN_DEVICE unsigned add_acquire_release(unsigned* word, unsigned value) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
#else
  return cuda_on_cpu::atomic_add(word, value);
#endif
}

// To be asked again and again, until it changes.
BNKERN_DEVICE unsigned load_acquire(const unsigned* word) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#else
  return cuda_on_cpu::poll(word);
#endif
}

// A cluster's blocks: all of its threads wait for each other, and see what the others wrote to shared memory before.
BNKERN_DEVICE void cluster_barrier() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
#endif
#else
  cuda_on_cpu::cluster_barrier();
#endif
}

// Where block `rank` of this cluster keeps what this block keeps at p, in shared memory.
template <class A>
BNKERN_DEVICE A* of_cluster_block(A* p, unsigned rank) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  A* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
#else
  return p;
#endif
#else
  return reinterpret_cast<A*>(cuda_on_cpu::of_cluster_block(reinterpret_cast<char*>(p), rank));
#endif
}

// Which block of its cluster this one is: clusters lie along x.
BNKERN_DEVICE unsigned cluster_rank() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
#else
  return cuda_on_cpu::cluster_rank();
#endif
}

}  // namespace bnkern
