// Who owns the memory in which the blocks of a kernel exchange partial results, and for how long.
//
// A workspace serves one call after the other: the kernels of a call hand partial results on in it, and leave its
// signals zero. So no kernel of another call may run in between, and each call queues all its kernels under a lock.
//
// - Calls outside of captures share one workspace for each device and stream. It is never freed; one that has become
//   too small stays allocated as well, since kernels may still use it and cudaFree would wait for the device. Sizes are
//   powers of two, the first one 1 MB, so that a stream has few.
// - Calls that are captured share one for each graph and stream: kernels that one stream captures depend on each other
//   in their order, and an executable graph never runs twice at the same time, but two graphs may. Two executables of
//   one graph, or clones of it within other graphs, share its workspace and must not run at the same time. The graph
//   owns it, as a CUDA user object: when the graph, and what was instantiated from it, is gone and its last launch has
//   finished, the memory goes to the next capture that needs as much or less. It is never returned to CUDA. One node of
//   the graph, a memset in front of the stream's first kernel, makes the signals zero.
//
// The memory comes from cudaMalloc and not from torch's allocator, which may at any time be directed to the private
// pool of a graph: what is kept out of such a pool would be given to a tensor as well (torch clears cuBLAS's workspaces
// around warm-ups for the same reason).
#pragma once

#include <functional>

#include "kernels.h"

namespace bnkern {

// Calls queue(workspace) with at least the needed workspace of the stream, a stream of the current device, while no
// other thread does so for this stream. Returns what queue returns, or with the call's name in front CUDA's words why
// there is no workspace. Throws std::bad_alloc where the device has no memory for it.
std::string with_workspace(const char* name, std::uintptr_t stream, WorkspaceSize needed,
                           const std::function<std::string(const CudaWorkspace&)>& queue);

}  // namespace bnkern
