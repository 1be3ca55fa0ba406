// Calls of tensors on CUDA devices.
#pragma once

#include "../cuda/kernels.h"

namespace bnkern {

// Registers the properties of a device on which plans depend, and the least size in bytes of a tensor whose calls are
// one kernel instead of two (Strategy in kernels.h). Call it with the GIL, once for each device, before its first call.
void register_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from);

}  // namespace bnkern
