// What the CUDA part offers to bind.cpp. Each function queues its kernels on `stream`, a stream of the
// current device, and returns "" or the reason why it could not. It allocates nothing and waits for nothing.
#pragma once

#include <cstdint>
#include <string>

#include "../dtype.h"

namespace bnkern {

// Rows k = 0, 1, ... of (count[k], mean[k, c], m2[k, c]), contiguous -> (merged_count, merged_mean[c], merged_m2[c]).
// All of one type, an accumulator's: fp32 or fp64.
struct CudaMerge {
  DType dtype;
  const void *count, *mean, *m2;
  void* merged_count;  // [1]; written where not null
  void *merged_mean, *merged_m2;
  std::int64_t rows, channels;
};
std::string cuda_merge(const CudaMerge& p, std::uintptr_t stream);

}  // namespace bnkern
