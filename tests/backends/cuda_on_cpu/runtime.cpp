#include "runtime.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

struct CUuserObject_st {
  void* data;
  cudaHostFn_t destroy;
};
struct CUgraph_st {
  std::vector<cudaUserObject_t> objects;
};

namespace {

constexpr int kSharedByDefault = 48 << 10, kSharedOptIn = 227 << 10;

struct Capture {
  unsigned long long id;
  cudaGraph_t graph;
};

std::mutex mutex;  // protects all variables below
int device = 0;
std::map<std::pair<int, const void*>, int> shared_limits;
std::map<cudaStream_t, Capture> captures;
unsigned long long captures_begun = 0;
long long allocations = 0, allocated_bytes = 0, memsets = 0, limits_set = 0;
long long memory_left = -1;  // bytes; unlimited if negative
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    default:
      return "cudaErrorInvalidValue";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "of the CUDA runtime on the host"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* current) {
  const std::lock_guard<std::mutex> lock(mutex);
  *current = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int chosen) {
  const std::lock_guard<std::mutex> lock(mutex);
  device = chosen;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kSharedOptIn;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (value > kSharedOptIn) return cudaErrorInvalidValue;
  shared_limits[{device, kernel}] = value;
  ++limits_set;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!captures.empty() && mode != cudaStreamCaptureModeRelaxed) return cudaErrorStreamCaptureUnsupported;
  if (memory_left >= 0 && memory_left < static_cast<long long>(bytes)) return cudaErrorMemoryAllocation;
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*data, 0xa5, bytes);  // noise
  ++allocations;
  allocated_bytes += static_cast<long long>(bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  const std::lock_guard<std::mutex> lock(mutex);
  std::memset(data, value, bytes);
  ++memsets;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) {
  std::swap(mode, *other);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = captures.find(stream);
  *status = found == captures.end() ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  if (found != captures.end()) *id = found->second.id, *graph = found->second.graph;
  return cudaSuccess;
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy, unsigned, unsigned) {
  *object = new CUuserObject_st{data, destroy};
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  object->destroy(object->data);
  delete object;
  return cudaSuccess;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  graph->objects.push_back(object);
  return cudaSuccess;
}

namespace cuda_on_cpu {
int allowed_shared_memory(const void* kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = shared_limits.find({device, kernel});
  return found == shared_limits.end() ? kSharedByDefault : found->second;
}
}  // namespace cuda_on_cpu

// ---- for the tests

extern "C" {
void set_device(int current) { device = current; }
void set_memory_left(long long bytes) { memory_left = bytes; }
void* begin_capture(std::uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto* const graph = new CUgraph_st;
  captures[reinterpret_cast<cudaStream_t>(stream)] = {++captures_begun, graph};
  return graph;
}
// A second stream joins the capture of the first one.
void join_capture(std::uintptr_t stream, std::uintptr_t first) {
  const std::lock_guard<std::mutex> lock(mutex);
  captures[reinterpret_cast<cudaStream_t>(stream)] = captures.at(reinterpret_cast<cudaStream_t>(first));
}
void end_capture(std::uintptr_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  captures.erase(reinterpret_cast<cudaStream_t>(stream));
}
void destroy_graph(void* data) {
  auto* const graph = static_cast<cudaGraph_t>(data);
  for (const cudaUserObject_t object : graph->objects) cudaUserObjectRelease(object, 1);
  delete graph;
}
long long counted(int which) {
  const std::lock_guard<std::mutex> lock(mutex);
  const long long counts[] = {allocations, allocated_bytes, memsets, limits_set};
  return counts[which];
}
}
