// The only functions that launch a kernel, and the device functions that standard C++ cannot express. A .cu file
// includes no other CUDA header. nvcc compiles these functions for the GPU. The host compiler compiles them for
// tests/backends/cuda_on_cpu, which runs every thread of a kernel as a fiber. The sources are the same. Every function
// in PTX below has a host version there, and so has every function of the CUDA runtime that launch.cu and workspaces.cu
// call.
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
  const char* name;  // name of the phase, for error messages
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes;
  std::uintptr_t stream;  // a cudaStream_t of the current device
  unsigned cluster = 1;   // number of blocks in a cluster, adjacent along x
};

// "name: CUDA's message", or "" if there is no error.
std::string error_text(const char* name, cudaError_t error);

// Allows a kernel the largest dynamic shared memory that a block of the current device can have. It is set once for
// each kernel and device. With a limit for each launch, another thread could lower the limit before this launch is
// queued. Kernels have no static shared memory, which would count towards the limit.
cudaError_t allow_shared_memory(const void* kernel);

namespace detail {
// Sets the attributes that a kernel needs before it is queued.
inline cudaError_t prepare(const Launch& settings, const void* kernel) {
  return settings.shared_bytes > (48 << 10) ? allow_shared_memory(kernel) : cudaSuccess;
}
}  // namespace detail

#ifdef __CUDACC__

namespace detail {
// The launch in CUDA's form. `attributes` has room for those of the configuration.
inline cudaLaunchConfig_t configuration(const Launch& settings, cudaLaunchAttribute (&attributes)[2],
                                        bool cooperative = false) {
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
  return config;
}

template <class... Params, class... Args>
cudaError_t queue(const Launch& settings, bool cooperative, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t config = configuration(settings, attributes, cooperative);
  cudaError_t error = prepare(settings, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess && settings.cluster > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error != cudaSuccess) cudaGetLastError();  // clears the error, so that later calls do not report it again
  return error;
}
}  // namespace detail

// Queues kernel(args...) and returns at once. It returns "", or the reason why the kernel could not be queued. Errors
// of the running kernel are reported by the next synchronisation of the stream, as for any kernel.
template <class... Params, class... Args>
std::string launch(const Launch& settings, void (*kernel)(Params...), Args&&... args) {
  return error_text(settings.name, detail::queue(settings, false, kernel, std::forward<Args>(args)...));
}

// The same with all blocks resident at once, so they may wait for each other. Returns false, and queues nothing, if the
// device cannot hold them all now. A process that has a share of the device may have fewer resident blocks.
template <class... Params, class... Args>
bool launch_resident(const Launch& settings, std::string* error, void (*kernel)(Params...), Args&&... args) {
  const cudaError_t code = detail::queue(settings, true, kernel, std::forward<Args>(args)...);
  if (code == cudaErrorCooperativeLaunchTooLarge || code == cudaErrorInvalidClusterSize) return false;
  *error = error_text(settings.name, code);
  return true;
}

// The same in clusters. Returns false, and queues nothing, if the device has no room for a cluster.
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

// 16 bytes, which a thread loads or stores at once.
struct alignas(16) Words {
  std::uint32_t word[4];
};

#ifdef __CUDACC__
#define BNKERN_DEVICE __device__ __forceinline__
extern __shared__ Words bnkern_shared[];
#else
#define BNKERN_DEVICE inline
#endif

// The block's shared memory, of the size that its launch requested. Kernels use no other way to access it. Its initial
// contents are undefined.
template <class A>
BNKERN_DEVICE A* shared_memory(std::size_t offset = 0) {
#ifdef __CUDACC__
  return reinterpret_cast<A*>(reinterpret_cast<char*>(bnkern_shared) + offset);
#else
  return reinterpret_cast<A*>(cuda_on_cpu::shared_memory() + offset);
#endif
}

// Loads 16 bytes of a tensor that this kernel does not write. They are not kept in the first-level cache.
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

// Loads two floats by a plain load. The compiler keeps several of these together, as it does with load_words(), while
// it would mix loads in C++ with the arithmetic behind them.
template <class Two>
BNKERN_DEVICE Two two_floats(const Two* p) {
#ifdef __CUDACC__
  Two two;
  asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(two.first), "=f"(two.second) : "l"(p) : "memory");
  return two;
#else
  return *p;
#endif
}

// Stores 16 bytes. In C++ the compiler would split the store if it keeps the words apart.
BNKERN_DEVICE void store_words(void* p, Words v) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
#else
  *static_cast<Words*>(p) = v;
#endif
}

// Eight bytes, which a thread loads or stores at once.
struct alignas(8) TwoWords {
  std::uint32_t word[2];
};
// Loads an operand of multiply_add() from shared memory. On the host the addresses of a warp's lanes can be recorded,
// so that the tests find bank conflicts.
BNKERN_DEVICE TwoWords load_operand(const char* p) {
#ifdef __CUDACC__
  return *reinterpret_cast<const TwoWords*>(p);
#else
  return cuda_on_cpu::load_operand<TwoWords>(p);
#endif
}

// Adds the product of a [16, 16] and b [16, 8] to d [16, 8], by all 32 lanes of a warp. The PTX manual says which
// values a lane has (m16n8k16 for .f16 and .bf16). With g = lane / 4 and t = lane % 4 they are
//   a: rows g, g + 8, g, g + 8 of columns 2t and 2t + 1, the last two words 8 columns further
//   b: rows 2t and 2t + 1 of column g, the second word 8 rows further
//   d: columns 2t and 2t + 1 of row g, then of row g + 8
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
#define BNKERN_MULTIPLY_ADD(type)                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.word[0]), "r"(b.word[1]))
#else
#define BNKERN_MULTIPLY_ADD(type) __trap()  // the host functions refuse such a device
#endif
BNKERN_DEVICE void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], TwoWords b, BFloat16*) {
  BNKERN_MULTIPLY_ADD("bf16");
}
BNKERN_DEVICE void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], TwoWords b, Float16*) {
  BNKERN_MULTIPLY_ADD("f16");
}
#undef BNKERN_MULTIPLY_ADD
#else
template <class T>
void multiply_add(float (&d)[4], const std::uint32_t (&a)[4], TwoWords b, T*) {
  cuda_on_cpu::multiply_add<T>(d, a, b.word);
}
#endif

// Two values, rounded to nearest even. The first one is in the lower half.
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

// a / b for positive numbers that are not subnormal, to within one unit in the last place. An exact division has a
// second path for subnormal numbers, which is as long as a tile's loads.
BNKERN_DEVICE float divide_normal(float a, float b) {
#ifdef __CUDACC__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  const float quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
#else
  return a / b;
#endif
}

// 1 / sqrt(value). It has fewer instructions than a root and a division.
BNKERN_DEVICE double inverse_root(double value) {
#ifdef __CUDACC__
  return rsqrt(value);
#else
  return 1 / std::sqrt(value);
#endif
}

// ---- memory order between blocks, only for exchange.h

BNKERN_DEVICE unsigned add_acquire_release(unsigned* word, unsigned value) {
#ifdef __CUDACC__
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
  return before;
#else
  return cuda_on_cpu::atomic_add(word, value);
#endif
}

// The same without the acquire and without a result. For an atomic addition with a result the compiler adds a shuffle
// among the lanes, for which the first warp would wait.
BNKERN_DEVICE void add_release(unsigned* word, unsigned value) {
#ifdef __CUDACC__
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" : : "l"(word), "r"(value) : "memory");
#else
  cuda_on_cpu::atomic_add(word, value);
#endif
}

// Loads a word that other blocks may be changing, without an order of memory.
BNKERN_DEVICE unsigned load_relaxed(const unsigned* word) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#else
  return *word;
#endif
}

// For a loop that reads a word until it changes.
BNKERN_DEVICE unsigned load_acquire(const unsigned* word) {
#ifdef __CUDACC__
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
#else
  return cuda_on_cpu::poll(word);
#endif
}

// The two halves of a barrier for all threads of a cluster. Every thread arrives, and waits before it arrives again.
// After the wait a thread can read what the others wrote to shared memory before they arrived.
BNKERN_DEVICE void arrive_in_cluster() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
#endif
#else
  cuda_on_cpu::arrive_in_cluster();
#endif
}
// Arrives without an order of memory. It is enough where the others wait only until this thread has read their memory,
// and it does not wait until the thread's own stores have reached the memory.
BNKERN_DEVICE void arrive_in_cluster_relaxed() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
#endif
#else
  cuda_on_cpu::arrive_in_cluster();
#endif
}
BNKERN_DEVICE void wait_in_cluster() {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#endif
#else
  cuda_on_cpu::wait_in_cluster();
#endif
}

// The address in the shared memory of block `rank` of this cluster that corresponds to p in this block's shared memory.
template <class A>
BNKERN_DEVICE A* of_cluster_block(A* p, unsigned rank) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 900
  A* remote;
  asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(p), "r"(rank));
  return remote;
#else
  return p;
#endif
#else
  return reinterpret_cast<A*>(cuda_on_cpu::of_cluster_block(reinterpret_cast<char*>(p), rank));
#endif
}

// The index of this block in its cluster. Clusters are along x.
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
