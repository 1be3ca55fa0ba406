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

// The smallest workspaces. Outside of captures it is large enough for almost all networks. In a capture it is 512 bytes
// of signals.
constexpr WorkspaceSize kLeastOwn{1024, 1 << 20}, kLeastCaptured{32, 0};

bool holds(const WorkspaceSize& size, const WorkspaceSize& needed) {
  return size.groups >= needed.groups && size.bytes >= needed.bytes;
}
// The size of the workspace that replaces one that is too small. It is in powers of two, so that few calls of a network
// need a new workspace.
WorkspaceSize enlarged(const WorkspaceSize& old, const WorkspaceSize& needed, const WorkspaceSize& least) {
  const auto power = [](std::int64_t a, std::int64_t b, std::int64_t c) {
    return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(std::max({a, b, c}))));
  };
  return {power(old.groups, needed.groups, least.groups), power(old.bytes, needed.bytes, least.bytes)};
}

// While this object exists, the thread may allocate memory during a capture, its own or another thread's, without
// invalidating it. The allocation is not captured.
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

// The workspaces of destroyed graphs. CUDA returns them on a thread of its own, possibly when the process ends. That
// thread must not call CUDA. So the lock is never held during a call of CUDA, and the object is never destroyed.
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
  // Takes the first one that is large enough. Returns false if there is none.
  bool take(int device, WorkspaceSize needed, CudaWorkspace* workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto& all = of_device_[device];
    const auto match = std::find_if(all.begin(), all.end(), [&](const auto& w) { return holds(w.size, needed); });
    if (match == all.end()) return false;
    *workspace = *match;
    all.erase(match);
    return true;
  }

 private:
  std::mutex mutex_;
  std::map<int, std::vector<CudaWorkspace>> of_device_;
};

struct GraphWorkspace {
  int device;
  CudaWorkspace workspace;
};
void give_back(void* data) {
  const auto* const owned = static_cast<GraphWorkspace*>(data);
  Returned::of_all_devices().add(owned->device, owned->workspace);
  delete owned;
}

// Makes the graph the owner of the workspace. If this fails, the workspace goes to the returned ones.
cudaError_t give_to_graph(cudaGraph_t graph, int device, const CudaWorkspace& workspace) {
  auto* const owned = new GraphWorkspace{device, workspace};
  cudaUserObject_t object;
  if (const auto error = cudaUserObjectCreate(&object, owned, give_back, 1, cudaUserObjectNoDestructorSync);
      error != cudaSuccess) {
    give_back(owned);
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

  // Provides a workspace of at least the needed size for the call that is queued next. The caller holds the lock.
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
    if (capture != capture_) captured_ = {}, capture_ = capture;  // each capture has its own number
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
  unsigned long long capture_ = 0;  // the capture to which captured_ belongs
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
    cudaGetLastError();  // clears the error, which is reported here
    throw std::bad_alloc();
  }
  return error == cudaSuccess ? queue(workspace) : error_text(name, error);
}

}  // namespace bnkern
