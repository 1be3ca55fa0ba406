#include "cuda.h"

#include <map>
#include <stdexcept>
#include <string>

#include "../cuda/on_device.h"
#include "calls.h"
#include "tensors.h"

namespace bnkern {
namespace {

struct Known {
  CudaDevice device;
  std::int64_t single_read_from;
};
std::map<int, Known>& known_devices() {
  static auto* const devices = new std::map<int, Known>;
  return *devices;
}

template <class Call, class CudaCall>
void launch(Call& call, PyObject* x, const dlpack::Device& on, std::string (*queue)(CudaCall, std::uintptr_t)) {
  const auto known = known_devices().find(on.id);
  if (known == known_devices().end())
    throw std::runtime_error("cuda:" + std::to_string(on.id) + " is not known to the native module");
  const Shape& shape = call.shape;
  const std::int64_t width = call.dtype == DType::kFloat64 ? 8 : call.dtype == DType::kFloat32 ? 4 : 2;
  const bool single = shape.n * shape.c * shape.s * width >= known->second.single_read_from;
  const CudaCall p{call, known->second.device, single ? Strategy::kSingleRead : Strategy::kTwoKernels, {}};
  const auto stream = reinterpret_cast<std::uintptr_t>(current_stream(x, on));
  std::string error;
  {
    // Other threads run meanwhile, since a launch waits where the stream's queue is full or CUDA loads a kernel. What
    // must not interleave is kept apart by a lock for each stream (workspaces.h), with or without a GIL.
    const Released others;
    const OnDevice current(on.id);
    error = queue(p, stream);
  }
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

void know_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from) {
  known_devices()[index] = {device, single_read_from};
}

void launch_cuda(Forward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_forward); }
void launch_cuda(Backward& p, PyObject* x, const dlpack::Device& device) { launch(p, x, device, cuda_backward); }

}  // namespace bnkern
