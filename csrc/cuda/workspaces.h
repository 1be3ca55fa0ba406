// Ownership and lifetime of workspaces, the memory in which the blocks of a kernel exchange partial results.
//
// The calls on a stream use a workspace in sequence. The kernels of a call pass partial results to each other in it,
// and leave its signals ready for the next call. So no kernel of another call may run in between, and each call queues
// all its kernels under a lock.
//
// - Calls outside of captures share one workspace for each device and stream. It is never freed. A workspace that has
//   become too small stays allocated too, because kernels may still use it and cudaFree would wait for the device.
//   Sizes are powers of two and start at 1 MB, so a stream has few workspaces.
// - Captured calls share one workspace for each graph and stream. The kernels that a stream captures run in their
//   order, and an executable graph never runs twice at the same time, but two graphs may run at the same time. Two
//   executables of one graph, or clones of it within other graphs, share its workspace and must not run at the same
//   time. The graph owns the workspace as a CUDA user object. After the graph and its executables are destroyed and the
//   last launch has finished, the memory goes to the next capture that needs at most this size. It is never returned to
//   CUDA. One node of the graph, a memset before the stream's first kernel, sets the signals to zero.
//
// The memory comes from cudaMalloc and not from torch's allocator. At any time this allocator may use the private pool
// of a graph. If a workspace were kept from such a pool, the allocator would give its memory to a tensor as well. (For
// the same reason torch clears cuBLAS's workspaces around warm-ups.)
#pragma once

#include <functional>

#include "kernels.h"

namespace bnkern {

// Calls queue(workspace) with a workspace of at least the needed size. `stream` is a stream of the current device, and
// no other thread does this for the stream at the same time. Returns the result of queue. If there is no workspace it
// returns the name of the call and CUDA's message. Throws std::bad_alloc if the device has no memory for a workspace.
std::string with_workspace(const char* name, std::uintptr_t stream, WorkspaceSize needed,
                           const std::function<std::string(const CudaWorkspace&)>& queue);

}  // namespace bnkern
