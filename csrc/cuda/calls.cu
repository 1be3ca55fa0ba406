// The two calls, by layout.
#include "kernels.h"

namespace bnkern {
namespace {

template <class P>
std::string refusal(const char* name, const P& p, std::int64_t needed) {
  const std::string prefix = std::string(name) + ": ";
  if (p.call.dtype == DType::kFloat64) return prefix + "the CUDA kernels take float32, bfloat16 and float16";
  if (p.workspace.bytes < needed)
    return prefix + "the workspace has " + std::to_string(p.workspace.bytes) + " bytes and must have " +
           std::to_string(needed);
  return {};
}

}  // namespace

std::int64_t cuda_forward_workspace(const CudaForward& p) {
  return p.call.shape.rows ? rows_forward_workspace(p) : planes_forward_workspace(p);
}
std::int64_t cuda_backward_workspace(const CudaBackward& p) {
  return p.call.shape.rows ? rows_backward_workspace(p) : planes_backward_workspace(p);
}

std::string cuda_forward(const CudaForward& p, std::uintptr_t stream) {
  const std::string why = refusal("forward", p, cuda_forward_workspace(p));
  if (!why.empty()) return why;
  return p.call.shape.rows ? rows_forward(p, stream) : planes_forward(p, stream);
}
std::string cuda_backward(const CudaBackward& p, std::uintptr_t stream) {
  const std::string why = refusal("backward", p, cuda_backward_workspace(p));
  if (!why.empty()) return why;
  return p.call.shape.rows ? rows_backward(p, stream) : planes_backward(p, stream);
}

}  // namespace bnkern
