// Dispatches the two calls by layout, and provides the workspace of their stream.
#include "kernels.h"
#include "workspaces.h"

namespace bnkern {
namespace {

template <class P>
std::string refusal(const char* name, const P& p, WorkspaceSize needed) {
  const std::string prefix = std::string(name) + ": ";
  if (p.call.dtype == DType::kFloat64) return prefix + "the CUDA kernels take float32, bfloat16 and float16";
  const WorkspaceSize size = p.workspace.size;
  if (size.groups >= needed.groups && size.bytes >= needed.bytes) return {};
  return prefix + "the workspace has " + std::to_string(size.bytes) + " bytes for " + std::to_string(size.groups) +
         " groups, and must have " + std::to_string(needed.bytes) + " for " + std::to_string(needed.groups);
}

}  // namespace

WorkspaceSize forward_workspace(const CudaForward& p) {
  return p.call.shape.rows ? rows_forward_workspace(p) : planes_forward_workspace(p);
}
WorkspaceSize backward_workspace(const CudaBackward& p) {
  return p.call.shape.rows ? rows_backward_workspace(p) : planes_backward_workspace(p);
}

std::string forward_within(const CudaForward& p, std::uintptr_t stream) {
  const std::string reason = refusal("forward", p, forward_workspace(p));
  if (!reason.empty()) return reason;
  return p.call.shape.rows ? rows_forward(p, stream) : planes_forward(p, stream);
}
std::string backward_within(const CudaBackward& p, std::uintptr_t stream) {
  const std::string reason = refusal("backward", p, backward_workspace(p));
  if (!reason.empty()) return reason;
  return p.call.shape.rows ? rows_backward(p, stream) : planes_backward(p, stream);
}

std::string cuda_forward(CudaForward p, std::uintptr_t stream) {
  return with_workspace("forward", stream, forward_workspace(p), [&](const CudaWorkspace& workspace) {
    p.workspace = workspace;
    return forward_within(p, stream);
  });
}
std::string cuda_backward(CudaBackward p, std::uintptr_t stream) {
  return with_workspace("backward", stream, backward_workspace(p), [&](const CudaWorkspace& workspace) {
    p.workspace = workspace;
    return backward_within(p, stream);
  });
}

}  // namespace bnkern
