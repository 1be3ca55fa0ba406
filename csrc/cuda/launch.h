// The only way a kernel is launched. A .cu file includes this header and no other CUDA header, so
// that the words kernels use can be given a meaning on the host as well.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace bnkern {

struct Launch {
  const char* name;  // of the phase, for the error text
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes;
  std::uintptr_t stream;  // a cudaStream_t of the current device
};

// Queues kernel(args...) and returns at once: "" or why it could not be queued. What goes wrong while
// the kernel runs is reported by the stream's next synchronisation, as for any kernel.
template <class... Params, class... Args>
std::string launch(const Launch& how, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = how.blocks;
  config.blockDim = how.threads;
  config.dynamicSmemBytes = how.shared_bytes;
  config.stream = reinterpret_cast<cudaStream_t>(how.stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // the error is reported here, not by whoever asks CUDA next
  return std::string(how.name) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
}

}  // namespace bnkern
