// Calls of tensors on CUDA devices.
#pragma once

#include "../cuda/kernels.h"

namespace bnkern {

// Registers the properties of a device on which partitions depend, and the least size in bytes of a tensor for which
// one kernel runs instead of two (Strategy in kernels.h). Call it with the GIL, once for each device, before any other
// call for this device.
void register_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from);

}  // namespace bnkern
