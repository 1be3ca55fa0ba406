// The host functions of launch.h that call the CUDA runtime.
#include "launch.h"

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
