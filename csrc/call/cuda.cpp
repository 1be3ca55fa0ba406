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
const RegisteredDevice& registered(const dlpack::Device& device) {
  const auto found = registered_devices().find(device.id);
  if (found == registered_devices().end())
    throw std::runtime_error("cuda:" + std::to_string(device.id) + " was not registered with the native module");
  return found->second;
}

// Calls queue(stream) with the device as the current one, without the GIL, because a launch waits if the stream's queue
// is full or CUDA loads a kernel. `like` is a tensor on the device. Throws an error that queue returns.
template <class Queue>
void on_stream(PyObject* like, const dlpack::Device& device, Queue queue) {
  const auto stream = reinterpret_cast<std::uintptr_t>(current_stream(like, device));
  std::string error;
  {
    const Released without_gil;
    const OnDevice current(device.id);
    error = queue(stream);
  }
  if (!error.empty()) throw std::runtime_error(error);
}

// Queues a call of batch norm. A lock for each stream (workspaces.h) keeps its kernels together, with or without a GIL.
template <class Call, class CudaCall>
void launch(Call& call, PyObject* x, const dlpack::Device& device, std::string (*queue)(CudaCall, std::uintptr_t)) {
  const RegisteredDevice& known = registered(device);
  const Shape& shape = call.shape;
  const std::int64_t width = call.dtype == DType::kFloat64 ? 8 : call.dtype == DType::kFloat32 ? 4 : 2;
  const bool single = shape.n * shape.c * shape.s * width >= known.single_read_from;
  const CudaCall p{call, known.properties, single ? Strategy::kSingleRead : Strategy::kTwoKernels, {}};
  on_stream(x, device, [&](std::uintptr_t stream) { return queue(p, stream); });
}

}  // namespace

void register_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from) {
  registered_devices()[index] = {device, single_read_from};
}

void launch_cuda(Forward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_forward); }
void launch_cuda(Backward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_backward); }
void launch_cuda(Update& p, PyObject* values, const dlpack::Device& device) {
  on_stream(values, device, [&](std::uintptr_t stream) { return cuda_update(p, stream); });
}
void launch_cuda(CudaConvNorm& p, PyObject* x, const dlpack::Device& device) {
  p.device = registered(device).properties;
  on_stream(x, device, [&](std::uintptr_t stream) { return cuda_conv_norm_forward(p, stream); });
}
std::string cuda_refusal(CudaConvNorm& p, const dlpack::Device& device) {
  p.device = registered(device).properties;
  return conv_norm_refusal(p);
}

}  // namespace bnkern
