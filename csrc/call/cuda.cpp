#include "cuda.h"

#include <map>
#include <stdexcept>
#include <string>

#include "../cuda/on_device.h"
#include "calls.h"
#include "tensors.h"

namespace bnkern {
namespace {

struct RegisteredDevice {
  CudaDevice properties;
  std::int64_t single_read_from;
};
std::map<int, RegisteredDevice>& registered_devices() {
  static auto* const devices = new std::map<int, RegisteredDevice>;
  return *devices;
}

template <class Call, class CudaCall>
void launch(Call& call, PyObject* x, const dlpack::Device& device, std::string (*queue)(CudaCall, std::uintptr_t)) {
  const auto registered = registered_devices().find(device.id);
  if (registered == registered_devices().end())
    throw std::runtime_error("cuda:" + std::to_string(device.id) + " is not known to the native module");
  const Shape& shape = call.shape;
  const std::int64_t width = call.dtype == DType::kFloat64 ? 8 : call.dtype == DType::kFloat32 ? 4 : 2;
  const bool single = shape.n * shape.c * shape.s * width >= registered->second.single_read_from;
  const CudaCall p{call, registered->second.properties, single ? Strategy::kSingleRead : Strategy::kTwoKernels, {}};
  const auto stream = reinterpret_cast<std::uintptr_t>(current_stream(x, device));
  std::string error;
  {
    // Release the GIL, because a launch waits if the stream's queue is full or CUDA loads a kernel. A lock for each
    // stream (workspaces.h) keeps the kernels of a call together, with or without a GIL.
    const Released other_threads;
    const OnDevice current(device.id);
    error = queue(p, stream);
  }
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

void register_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from) {
  registered_devices()[index] = {device, single_read_from};
}

void launch_cuda(Forward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_forward); }
void launch_cuda(Backward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_backward); }

}  // namespace bnkern
