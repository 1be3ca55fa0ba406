#include "workspaces.h"

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "launch.h"

namespace bnkern {
namespace {

// Of a call outside of captures: so much that hardly any network needs more. Of a captured one: 512 bytes of signals.
constexpr WorkspaceSize kLeastOwn{1024, 1 << 20}, kLeastCaptured{32, 0};

bool holds(const WorkspaceSize& size, const WorkspaceSize& needed) {
  return size.groups >= needed.groups && size.bytes >= needed.bytes;
}
// What replaces a workspace that is too small, in powers of two, so that few calls of a network need another one.
WorkspaceSize enlarged(const WorkspaceSize& old, const WorkspaceSize& needed, const WorkspaceSize& least) {
  const auto power = [](std::int64_t a, std::int64_t b, std::int64_t c) {
    return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::max({a, b, c}))));
  };
  return {power(old.groups, needed.groups, least.groups), power(old.bytes, needed.bytes, least.bytes)};
}

// Allocation is no part of a capture, be it this thread's or another's, and does not spoil it.
class OutsideOfCaptures {
 public:
  OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~OutsideOfCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  OutsideOfCaptures(const OutsideOfCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

cudaError_t allocate(WorkspaceSize size, CudaWorkspace* workspace) {
  const OutsideOfCaptures guard;
  workspace->size = size;
  return cudaMalloc(&workspace->data, signal_bytes(size.groups) + size.bytes);
}

cudaError_t clear_signals(const CudaWorkspace& workspace, cudaStream_t stream) {
  return cudaMemsetAsync(workspace.data, 0, signal_bytes(workspace.size.groups), stream);
}

// Workspaces of graphs that are gone. CUDA returns them on a thread of its own, perhaps when the process ends, where it
// must not be called: hence a lock that is never held during a call of CUDA, and an object that is never destroyed.
class Returned {
 public:
  static Returned& of_all_devices() {
    static Returned* const returned = new Returned;
    return *returned;
  }
  void add(int device, const CudaWorkspace& workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    of_device_[device].push_back(workspace);
  }
  // The first that holds as much. False where there is none.
  bool take(int device, WorkspaceSize needed, CudaWorkspace* workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& all = of_device_[device];
    const auto found = std::find_if(all.begin(), all.end(), [&](const auto& w) { return holds(w.size, needed); });
    if (found == all.end()) return false;
    *workspace = *found;
    all.erase(found);
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<CudaWorkspace>> of_device_;
};

struct OfGraph {
  int device;
  CudaWorkspace workspace;
};
void give_back(void* data) {
  const auto* const of_graph = static_cast<OfGraph*>(data);
  Returned::of_all_devices().add(of_graph->device, of_graph->workspace);
  delete of_graph;
}

// From here on the graph owns the workspace, also where this fails.
cudaError_t give_to_graph(cudaGraph_t graph, int device, const CudaWorkspace& workspace) {
  auto* const of_graph = new OfGraph{device, workspace};
  cudaUserObject_t object;
  if (const auto error = cudaUserObjectCreate(&object, of_graph, give_back, 1, cudaUserObjectNoDestructorSync);
      error != cudaSuccess) {
    give_back(of_graph);
    return error;
  }
  const cudaError_t error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) cudaUserObjectRelease(object, 1);
  return error;
}

class Stream {
 public:
  Stream(int device, cudaStream_t stream) : device_(device), stream_(stream) {}

  std::mutex& launches() { return launches_; }

  // At least the needed workspace, for the call that is queued next. Called with the lock.
  cudaError_t provide(WorkspaceSize needed, CudaWorkspace* workspace) {
    cudaStreamCaptureStatus status;
    unsigned long long capture = 0;
    cudaGraph_t graph = nullptr;
    if (const auto error = cudaStreamGetCaptureInfo(stream_, &status, &capture, &graph); error != cudaSuccess)
      return error;
    const cudaError_t error =
        status == cudaStreamCaptureStatusActive ? provide_captured(needed, capture, graph) : provide_own(needed);
    *workspace = status == cudaStreamCaptureStatusActive ? captured_ : own_;
    return error;
  }

 private:
  cudaError_t provide_own(WorkspaceSize needed) {
    if (holds(own_.size, needed)) return cudaSuccess;
    CudaWorkspace fresh;
    cudaError_t error = allocate(enlarged(own_.size, needed, kLeastOwn), &fresh);
    if (error == cudaSuccess) error = clear_signals(fresh, stream_);
    if (error == cudaSuccess) own_ = fresh;
    return error;
  }

  cudaError_t provide_captured(WorkspaceSize needed, unsigned long long capture, cudaGraph_t graph) {
    if (capture != capture_) captured_ = {}, capture_ = capture;  // no two captures have the same number
    if (holds(captured_.size, needed)) return cudaSuccess;
    const WorkspaceSize size = enlarged(captured_.size, needed, kLeastCaptured);
    CudaWorkspace fresh;
    cudaError_t error = cudaSuccess;
    if (!Returned::of_all_devices().take(device_, size, &fresh)) error = allocate(size, &fresh);
    if (error == cudaSuccess) error = give_to_graph(graph, device_, fresh);
    if (error == cudaSuccess) error = clear_signals(fresh, stream_);
    if (error == cudaSuccess) captured_ = fresh;
    return error;
  }

  const int device_;
  const cudaStream_t stream_;
  std::mutex launches_;
  CudaWorkspace own_{}, captured_{};
  unsigned long long capture_ = 0;  // whose captured_ is
};

Stream& stream_of(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static auto* const streams = new std::map<std::pair<int, cudaStream_t>, Stream>;
  const std::lock_guard<std::mutex> lock(mutex);
  return streams->try_emplace({device, stream}, device, stream).first->second;
}

}  // namespace

std::string with_workspace(const char* name, std::uintptr_t stream, WorkspaceSize needed,
                           const std::function<std::string(const CudaWorkspace&)>& queue) {
  int device;
  CudaWorkspace workspace;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error_text(name, error);
  Stream& own = stream_of(device, reinterpret_cast<cudaStream_t>(stream));
  const std::lock_guard<std::mutex> lock(own.launches());
  error = own.provide(needed, &workspace);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // reported here
    throw std::bad_alloc();
  }
  return error == cudaSuccess ? queue(workspace) : error_text(name, error);
}

}  // namespace bnkern
