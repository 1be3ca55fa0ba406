// The kernels' host functions with C linkage, for ctypes (native.py).
#include <new>
#include <string>

#include "../../../csrc/cuda/kernels.h"
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/workspaces.h"

namespace {
thread_local std::string message;
const char* store(std::string text) {
  message = std::move(text);
  return message.c_str();
}
template <class F>
const char* store_or_no_memory(F f) {
  try {
    return store(f());
  } catch (const std::bad_alloc&) {
    return "no memory";
  }
}
}  // namespace

extern "C" {
const char* forward(const bnkern::CudaForward* p, std::uintptr_t stream) {
  return store_or_no_memory([&] { return bnkern::cuda_forward(*p, stream); });
}
const char* backward(const bnkern::CudaBackward* p, std::uintptr_t stream) {
  return store_or_no_memory([&] { return bnkern::cuda_backward(*p, stream); });
}
const char* forward_within(const bnkern::CudaForward* p) { return store(bnkern::forward_within(*p, 0)); }
const char* backward_within(const bnkern::CudaBackward* p) { return store(bnkern::backward_within(*p, 0)); }
const char* conv_norm_forward_within(const bnkern::CudaConvNorm* p) {
  return store(bnkern::conv_norm_forward_within(*p, 0));
}
void conv_norm_forward_workspace(const bnkern::CudaConvNorm* p, bnkern::WorkspaceSize* size) {
  *size = bnkern::conv_norm_forward_workspace(*p);
}
const char* merge(const bnkern::CudaMerge* p) { return store(bnkern::cuda_merge(*p, 0)); }
void forward_workspace(const bnkern::CudaForward* p, bnkern::WorkspaceSize* size) {
  *size = bnkern::forward_workspace(*p);
}
void backward_workspace(const bnkern::CudaBackward* p, bnkern::WorkspaceSize* size) {
  *size = bnkern::backward_workspace(*p);
}
std::int64_t signal_bytes(std::int64_t groups) { return bnkern::signal_bytes(groups); }
// The workspace of a call on the stream with this many groups and bytes.
const char* workspace(std::uintptr_t stream, std::int64_t groups, std::int64_t bytes, bnkern::CudaWorkspace* result) {
  return store_or_no_memory([&] {
    return bnkern::with_workspace("call", stream, {groups, bytes}, [&](const bnkern::CudaWorkspace& workspace) {
      *result = workspace;
      return std::string();
    });
  });
}
const char* allow_shared_memory(const void* kernel) {
  return store(bnkern::error_text("call", bnkern::allow_shared_memory(kernel)));
}
int allowed_shared_memory(const void* kernel) { return cuda_on_cpu::allowed_shared_memory(kernel); }
std::int64_t sizes(int which) {
  constexpr std::int64_t kSizes[] = {sizeof(bnkern::CudaForward), sizeof(bnkern::CudaBackward),
                                     sizeof(bnkern::CudaMerge), sizeof(bnkern::CudaConvNorm)};
  return kSizes[which];
}
}
