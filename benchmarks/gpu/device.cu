// Two checks of a device that need no torch: device CUBIN...
//
// 1. How many blocks and clusters of the batch norm kernels the device holds at once. The cubins are those of the
//    native module. The kernels are bf16, without records: those of one kernel per call, and then those of two, of
//    which the plans expect two blocks of 256 threads for each multiprocessor. Some multiprocessors may be unable to
//    run a block of a cluster of 8, so a grid of 16 clusters can take two waves.
// 2. Whether the fragments of mma.sync and ldmatrix.trans lie in the registers as the PTX manual says (sections on
//    m16n8k16 and ldmatrix). The products are of small integers, so they are exact.
//
// Output: lines of comma-separated values, which device.py reads. The exit status is 1 if a call fails or a layout
// differs from the manual.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

// ------------------------------------------------------------------------------------------------------- occupancy

// A function of the driver, without linking with the driver's library.
template <class F>
F driver(const char* name) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion(name, &address, 12040, cudaEnableDefault, &found) != cudaSuccess || !address) {
    std::fprintf(stderr, "the driver has no %s\n", name);
    std::exit(1);
  }
  return reinterpret_cast<F>(address);
}

void check(int status, const char* what) {
  if (status == 0) return;
  std::fprintf(stderr, "%s: error %d\n", what, status);
  std::exit(1);
}

struct Kernel {
  const char* name;
  const char* mangled;  // a part of the mangled name
  bool clusters;
};
constexpr Kernel kKernels[] = {
    {"planes_forward", "planes_forward_kernelINS_8BFloat16ELb1ELb1ELb0ELb1EE", true},
    {"planes_backward", "planes_backward_kernelINS_8BFloat16ELb1ELb1ELb0ELb1EE", true},
    {"rows_forward", "rows_forward_kernelINS_8BFloat16ELb0EE", false},
    {"rows_backward", "rows_backward_kernelINS_8BFloat16ELb0EE", false},
    {"planes_moments", "planes_forward_kernelINS_8BFloat16ELb1ELb0ELb0ELb1EE", false},
    {"planes_normalize", "planes_forward_kernelINS_8BFloat16ELb0ELb1ELb0ELb1EE", false},
    {"planes_grad_sums", "planes_backward_kernelINS_8BFloat16ELb1ELb0ELb0ELb1EE", false},
    {"planes_grad_input", "planes_backward_kernelINS_8BFloat16ELb0ELb1ELb0ELb1EE", false},
    {"rows_moments", "rows_moments_kernelINS_8BFloat16ELi8EE", false},
    {"rows_normalize", "rows_normalize_kernelINS_8BFloat16ELb0EE", false},
    {"rows_grad_sums", "rows_grad_sums_kernelINS_8BFloat16ELi8ELb0EE", false},
    {"rows_grad_input", "rows_grad_input_kernelINS_8BFloat16ELb0EE", false},
};

void print_occupancy(const char* cubin) {
  const auto load = driver<decltype(&cuModuleLoad)>("cuModuleLoad");
  const auto count_functions = driver<decltype(&cuModuleGetFunctionCount)>("cuModuleGetFunctionCount");
  const auto enumerate = driver<decltype(&cuModuleEnumerateFunctions)>("cuModuleEnumerateFunctions");
  const auto name_of = driver<decltype(&cuFuncGetName)>("cuFuncGetName");
  const auto attribute = driver<decltype(&cuFuncGetAttribute)>("cuFuncGetAttribute");
  const auto set = driver<decltype(&cuFuncSetAttribute)>("cuFuncSetAttribute");
  const auto active_clusters = driver<decltype(&cuOccupancyMaxActiveClusters)>("cuOccupancyMaxActiveClusters");
  const auto active_blocks =
      driver<decltype(&cuOccupancyMaxActiveBlocksPerMultiprocessor)>("cuOccupancyMaxActiveBlocksPerMultiprocessor");
  int has_clusters = 0;
  check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, 0), "cudaDeviceGetAttribute");
  CUmodule module;
  check(load(&module, cubin), cubin);
  unsigned count = 0;
  check(count_functions(&count, module), "cuModuleGetFunctionCount");
  std::vector<CUfunction> functions(count);
  check(enumerate(functions.data(), count, module), "cuModuleEnumerateFunctions");
  for (const CUfunction function : functions) {
    const char* mangled = nullptr;
    check(name_of(&mangled, function), "cuFuncGetName");
    for (const Kernel& kernel : kKernels) {
      if (!std::strstr(mangled, kernel.mangled)) continue;
      int registers = 0;
      check(attribute(&registers, CU_FUNC_ATTRIBUTE_NUM_REGS, function), "cuFuncGetAttribute");
      check(set(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200 << 10), "cuFuncSetAttribute");
      const bool clusters = kernel.clusters && has_clusters;
      if (clusters) check(set(function, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1), "cuFuncSetAttribute");
      for (const int threads : {256, 512})
        for (const int shared : {8 << 10, 100 << 10, 200 << 10}) {
          int blocks = 0;
          check(active_blocks(&blocks, function, threads, shared), "cuOccupancyMaxActiveBlocksPerMultiprocessor");
          std::printf("blocks,%s,%d,%d,%d,1,%d\n", kernel.name, registers, threads, shared, blocks);
          for (const unsigned size : {2u, 4u, 8u, 16u}) {
            if (!clusters) break;
            CUlaunchAttribute cluster{};
            cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            cluster.value.clusterDim.x = size;
            cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1;
            CUlaunchConfig config{};
            config.gridDimX = 16 * size;
            config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1;
            config.blockDimX = threads;
            config.sharedMemBytes = shared;
            config.attrs = &cluster;
            config.numAttrs = 1;
            int active = 0;
            if (active_clusters(&active, function, &config) != CUDA_SUCCESS) active = 0;
            std::printf("clusters,%s,%d,%d,%d,%u,%d\n", kernel.name, registers, threads, shared, size, active);
          }
        }
    }
  }
}

// -------------------------------------------------------------------------------------------------------- fragments

__device__ std::uint32_t bf16(int value) { return __float_as_uint(static_cast<float>(value)) >> 16; }
__device__ std::uint32_t pair(int low, int high) { return bf16(low) | bf16(high) << 16; }
__host__ __device__ int element_a(int row, int k) { return (3 * row + 5 * k) % 13 - 6; }
__host__ __device__ int element_b(int k, int column) { return (7 * k + 2 * column) % 11 - 5; }

// One warp: d[16][8] = a[16][16] b[16][8].
__global__ void multiply(float* d) {
  const int group = threadIdx.x / 4, low = threadIdx.x % 4 * 2;
  const auto a = [&](int row, int k) { return pair(element_a(row, k), element_a(row, k + 1)); };
  const auto b = [&](int k) { return pair(element_b(k, group), element_b(k + 1, group)); };
  float c[4] = {};
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a(group, low)), "r"(a(group + 8, low)), "r"(a(group, low + 8)), "r"(a(group + 8, low + 8)), "r"(b(low)),
        "r"(b(low + 8)));
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + low + i % 2] = c[i];
}

// One warp: each thread's two values of a transposed 8 x 8 matrix of 16 bits.
__global__ void load_transposed(std::uint32_t* result) {
  __shared__ __align__(16) std::uint16_t matrix[64];
  for (int i = threadIdx.x; i < 64; i += 32) matrix[i] = static_cast<std::uint16_t>(i);
  __syncwarp();
  const auto row = static_cast<std::uint32_t>(__cvta_generic_to_shared(&matrix[threadIdx.x % 8 * 8]));
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(result[threadIdx.x])
               : "r"(row)
               : "memory");
}

bool print_layouts() {
  float d[128], *d_device;
  std::uint32_t loaded[32], *loaded_device;
  check(cudaMalloc(&d_device, sizeof d), "cudaMalloc");
  check(cudaMalloc(&loaded_device, sizeof loaded), "cudaMalloc");
  multiply<<<1, 32>>>(d_device);
  load_transposed<<<1, 32>>>(loaded_device);
  check(cudaGetLastError(), "launch");
  check(cudaMemcpy(d, d_device, sizeof d, cudaMemcpyDeviceToHost), "multiply");
  check(cudaMemcpy(loaded, loaded_device, sizeof loaded, cudaMemcpyDeviceToHost), "load_transposed");
  int wrong = 0, swapped = 0;
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) sum += element_a(row, k) * element_b(k, column);
      wrong += d[row * 8 + column] != static_cast<float>(sum);
    }
  for (unsigned thread = 0; thread < 32; ++thread) {
    const unsigned row = thread % 4 * 2, column = thread / 4;
    swapped += loaded[thread] != (row * 8 + column | ((row + 1) * 8 + column) << 16);
  }
  std::printf("layout,mma.m16n8k16,%d\nlayout,ldmatrix.trans,%d\n", wrong, swapped);
  return wrong == 0 && swapped == 0;
}

int main(int count, char** arguments) {
  check(cudaFree(nullptr), "no device");  // makes a context
  for (int i = 1; i < count; ++i) print_occupancy(arguments[i]);
  return print_layouts() ? 0 : 1;
}
