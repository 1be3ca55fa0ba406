// Calls of tensors on CUDA devices.
#pragma once

#include "../cuda/kernels.h"

namespace bnkern {

// What plans for the device of that index depend on, and from how many bytes of a tensor on a call is one kernel rather
// than two (Strategy in kernels.h). Once for each device, with the GIL, before its first call.
void know_cuda_device(int index, const CudaDevice& device, std::int64_t single_read_from);

}  // namespace bnkern
