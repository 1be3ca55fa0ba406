// The kernels' host functions for ctypes, which knows no C++ (native.py).
#include <string>

#include "../../csrc/cuda/kernels.h"

namespace {
std::string said;
const char* keep(std::string words) {
  said = std::move(words);
  return said.c_str();
}
}  // namespace

extern "C" {
const char* forward(const bnkern::CudaForward* p) { return keep(bnkern::cuda_forward(*p, 0)); }
const char* backward(const bnkern::CudaBackward* p) { return keep(bnkern::cuda_backward(*p, 0)); }
const char* merge(const bnkern::CudaMerge* p) { return keep(bnkern::cuda_merge(*p, 0)); }
std::int64_t forward_workspace(const bnkern::CudaForward* p) { return bnkern::cuda_forward_workspace(*p); }
std::int64_t backward_workspace(const bnkern::CudaBackward* p) { return bnkern::cuda_backward_workspace(*p); }
std::int64_t sizes(int which) {
  constexpr std::int64_t kSizes[] = {sizeof(bnkern::CudaForward), sizeof(bnkern::CudaBackward),
                                     sizeof(bnkern::CudaMerge)};
  return kSizes[which];
}
}
