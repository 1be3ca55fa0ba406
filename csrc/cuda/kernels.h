// The interface of the CUDA kernels for csrc/call. Each function queues its kernels on `stream`, a stream of the
// current device, and returns "" or the reason why it could not. It does not wait for the device, and it allocates
// nothing but workspaces.
//
// A file of kernels has three parts. The plan is a plain struct that says how a tensor is divided. It depends on shape,
// strides, dtype, strategy and device alone. The kernels are __global__ templates over the storage type, which take the
// call, the plan and their part of the workspace by value. The last part is the function that is declared here.
//
// These files include launch.h, exchange.h and device.h, but no CUDA header. Offsets have 64 bits everywhere, because a
// thread computes few of them and then adds to pointers. tests/backends/cuda_on_cpu runs the same sources, so three
// rules hold: data crosses between blocks only through exchange.h, PTX is only in functions of launch.h, which have
// host versions, and shared memory is accessed only by shared_memory().
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "../params.h"

namespace bnkern {

// Merges the rows k = 0, 1, ... of (count[k], mean[k, c], m2[k, c]), which are contiguous, into (merged_count,
// merged_mean[c], merged_m2[c]). All have the same type, which is that of an accumulator: fp32 or fp64.
struct CudaMerge {
  DType dtype;
  const void *count, *mean, *m2;
  void* merged_count;  // [1], may be null
  void *merged_mean, *merged_m2;
  std::int64_t rows, channels;
};
std::string cuda_merge(const CudaMerge& p, std::uintptr_t stream);

// A call of update, for fp32 with gradients in fp32 or bf16.
std::string cuda_update(const Update& p, std::uintptr_t stream);

// The properties of a device on which plans may depend. Equal properties give equal bits.
struct CudaDevice {
  int multiprocessors;
  int shared_bytes;  // the limit for a block
  int threads;       // the limit for a block: 512, fewer on the host
  // How many clusters of 2, 4 and 8 blocks run at once if each block has a multiprocessor for itself. This may be less
  // than the number of multiprocessors divided by the size, because all blocks of a cluster run within one group of
  // multiprocessors. 0 without capability 9.0.
  std::array<int, 3> clusters;
};

// Computes CudaDevice::clusters, by queries of CUDA, for a device whose blocks can have `shared_bytes` of shared
// memory.
std::string count_clusters(int device, int shared_bytes, std::array<int, 3>& clusters);

// Either two kernels that each read x, or one kernel that keeps on the chip as much of x as fits, until the statistics
// are known. The blocks of a group, or of a cluster, wait for each other at a barrier in the one kernel. If the device
// cannot hold all blocks of the one kernel at once, two kernels compute the same bits.
enum class Strategy : int { kTwoKernels = 0, kSingleRead = 1 };

// Memory that the calls on one stream use in sequence (workspaces.h). It begins with the signals (exchange.h) of
// `groups` groups of blocks, which are zero before the first call. The contents of the `bytes` behind them are
// undefined.
struct WorkspaceSize {
  std::int64_t groups, bytes;
};
struct CudaWorkspace {
  void* data;
  WorkspaceSize size;
};
// The size of the signals: one signal of all groups together, then a barrier and an arrival signal for each group. It
// is rounded up to 256 bytes, which aligns the memory behind it.
inline std::int64_t signal_bytes(std::int64_t groups) {
  return ((1 + 2 * groups) * static_cast<std::int64_t>(sizeof(unsigned)) + 255) / 256 * 256;
}

// Calls of params.h, with fp32, bf16 or fp16 tensors that are not empty. `threads` is ignored.
struct CudaForward {
  Forward call;
  CudaDevice device;
  Strategy strategy;  // of moments and normalize together
  CudaWorkspace workspace;
};
struct CudaBackward {
  Backward call;
  CudaDevice device;
  Strategy strategy;  // of grad_sums and grad_input together
  CudaWorkspace workspace;
};
// Use the workspace of the stream, and ignore p.workspace. Several threads may call them at once.
std::string cuda_forward(CudaForward p, std::uintptr_t stream);
std::string cuda_backward(CudaBackward p, std::uintptr_t stream);

// Use p.workspace. No other call may use it before this call has queued all its kernels.
std::string forward_within(const CudaForward& p, std::uintptr_t stream);
std::string backward_within(const CudaBackward& p, std::uintptr_t stream);

// The size of the workspace that a call needs. It does not depend on the addresses, except on their alignment and on
// which of them are null.
WorkspaceSize forward_workspace(const CudaForward& p);
WorkspaceSize backward_workspace(const CudaBackward& p);

// A call of conv_norm_forward (bnkern/backends/reference/conv_norm.py) for bf16 and fp16 in channels_last: a 3 x 3
// convolution of stride and padding 1 between C and C channels, with normalize of its input and moments of its output.
// All tensors of images are dense, begin at multiples of 16 bytes, and are not empty.
struct CudaConvNorm {
  Forward input;       // normalize: x, residual, y and mask as in a call. If mean is null, x is the convolution's input
  Forward output;      // moments and running statistics of r. Its x is r, which is written, and `spread` becomes invstd
  const void* weight;  // [C, C, 3, 3] of the same dtype, with any strides in elements
  std::int64_t weight_output, weight_input, weight_h, weight_w;
  std::int64_t h, w;  // of an image
  CudaDevice device;
  CudaWorkspace workspace;
};
// "" or the reason why the kernel does not serve such a call. It reads the shape and the dtype of `output`, h, w and
// the device.
std::string conv_norm_refusal(const CudaConvNorm& p);
// As cuda_forward, forward_within and forward_workspace.
std::string cuda_conv_norm_forward(CudaConvNorm p, std::uintptr_t stream);
std::string conv_norm_forward_within(const CudaConvNorm& p, std::uintptr_t stream);
WorkspaceSize conv_norm_forward_workspace(const CudaConvNorm& p);

// The same functions of batch norm for each of the two layouts.
std::string rows_forward(const CudaForward& p, std::uintptr_t stream);
std::string rows_backward(const CudaBackward& p, std::uintptr_t stream);
WorkspaceSize rows_forward_workspace(const CudaForward& p);
WorkspaceSize rows_backward_workspace(const CudaBackward& p);
std::string planes_forward(const CudaForward& p, std::uintptr_t stream);
std::string planes_backward(const CudaBackward& p, std::uintptr_t stream);
WorkspaceSize planes_forward_workspace(const CudaForward& p);
WorkspaceSize planes_backward_workspace(const CudaBackward& p);

}  // namespace bnkern
