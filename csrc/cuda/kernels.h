// What the CUDA part offers to csrc/call. Each function queues its kernels on `stream`, a stream of the current
// device, and returns "" or the reason why it could not. It waits for nothing, and allocates a workspace at most.
//
// How a file of kernels is laid out: the plan, a plain struct that says how a tensor is cut up and which is a function
// of shape, strides, dtype, strategy and device alone; __global__ templates over the storage type, which take the call,
// the plan and what they need of the workspace by value; the function declared here. It includes launch.h, exchange.h,
// device.h and no CUDA header. Offsets are 64 bits wide everywhere: a thread computes few of them, and adds to
// pointers. Whatever crosses from block to block goes through exchange.h, whatever is PTX is a word of launch.h with
// its twin on the host, and shared memory is reached by shared_memory() alone: tests/backends/cuda_on_cpu runs the same
// sources.
#pragma once

#include <cstdint>
#include <string>

#include "../params.h"

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

// What the partition of a tensor may depend on besides its shape. The same numbers give the same bits.
struct CudaDevice {
  int multiprocessors;
  int shared_bytes;  // at most, of a block
  int threads;       // at most, of a block: 512, fewer on the host
  bool clusters;     // compute capability 9.0 and later
};

// Two kernels that each read x, or one whose blocks keep on chip what they read, as much of it as fits, until they know
// the statistics: its blocks meet at a barrier between all of them, or between those of a cluster. Where the device
// cannot hold the one kernel's blocks all at once, two kernels do the same with the same bits.
enum class Strategy : int { kTwoKernels = 0, kSingleRead = 1 };

// Memory that calls on one stream share, one after the other (workspaces.h). It begins with the signals (exchange.h) of
// `groups` groups of blocks, which are zero before the first call; the `bytes` behind them may hold anything.
struct WorkspaceSize {
  std::int64_t groups, bytes;
};
struct CudaWorkspace {
  void* data;
  WorkspaceSize size;
};
// One signal of all groups together, then a barrier and an arrival signal for each. What follows is aligned to as much.
inline std::int64_t signal_bytes(std::int64_t groups) {
  return ((1 + 2 * groups) * static_cast<std::int64_t>(sizeof(unsigned)) + 255) / 256 * 256;
}

// Calls of params.h, with fp32, bf16 or fp16 tensors that are not empty; `threads` is not looked at.
struct CudaForward {
  Forward call;
  CudaDevice device;
  Strategy strategy;  // of moments and normalize as one
  CudaWorkspace workspace;
};
struct CudaBackward {
  Backward call;
  CudaDevice device;
  Strategy strategy;  // of sums and input as one
  CudaWorkspace workspace;
};
// With the stream's workspace, whatever p.workspace is. Several threads may call them at once.
std::string cuda_forward(CudaForward p, std::uintptr_t stream);
std::string cuda_backward(CudaBackward p, std::uintptr_t stream);

// With p.workspace, which no other call may use before this one has queued all its kernels.
std::string forward_within(const CudaForward& p, std::uintptr_t stream);
std::string backward_within(const CudaBackward& p, std::uintptr_t stream);

// How much workspace such a call needs: its addresses count only by their alignment, and by being null.
WorkspaceSize forward_workspace(const CudaForward& p);
WorkspaceSize backward_workspace(const CudaBackward& p);

// The two layouts, one file each, behind the functions above.
std::string rows_forward(const CudaForward& p, std::uintptr_t stream);
std::string rows_backward(const CudaBackward& p, std::uintptr_t stream);
WorkspaceSize rows_forward_workspace(const CudaForward& p);
WorkspaceSize rows_backward_workspace(const CudaBackward& p);
std::string planes_forward(const CudaForward& p, std::uintptr_t stream);
std::string planes_backward(const CudaBackward& p, std::uintptr_t stream);
WorkspaceSize planes_forward_workspace(const CudaForward& p);
WorkspaceSize planes_backward_workspace(const CudaBackward& p);

}  // namespace bnkern
