// The host functions of launch.h that call the CUDA runtime.
#include "launch.h"

#include "kernels.h"

#include <mutex>
#include <set>
#include <utility>

#include "on_device.h"

namespace bnkern {

std::string error_text(const char* name, cudaError_t error) {
  if (error == cudaSuccess) return {};
  return std::string(name) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

OnDevice::OnDevice(int device) {
  int current;
  if (cudaGetDevice(&current) != cudaSuccess || current == device) return;
  if (cudaSetDevice(device) == cudaSuccess) before_ = current;
}
OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

#ifdef __CUDACC__

namespace {
__global__ void __launch_bounds__(512) idle_kernel() {}
}  // namespace

std::string count_clusters(int device, int shared_bytes, std::array<int, 3>& clusters) {
  const OnDevice current(device);
  Launch settings{"count_clusters", 0, 512, static_cast<std::size_t>(shared_bytes), 0};
  for (int i = 0; i < 3; ++i) {
    settings.cluster = 2u << i;
    settings.blocks = settings.cluster;
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = detail::configuration(settings, attributes);
    cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(idle_kernel));
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters[i], idle_kernel, &config);
    if (error != cudaSuccess) return error_text(settings.name, error);
  }
  return {};
}

#endif

cudaError_t allow_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static auto* const allowed = new std::set<std::pair<const void*, int>>;
  int device, most;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (allowed->count({kernel, device})) return cudaSuccess;
  }
  // No lock here, because CUDA may have to load the kernel first. If two threads get here, both set the same value.
  cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  allowed->insert({kernel, device});
  return cudaSuccess;
}

}  // namespace bnkern
