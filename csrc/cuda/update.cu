// update: one step of SGD for all parameters in one launch. A thread updates an octet of the flat tensors.
//
// The gradients are tensors of their own, as autograd leaves them. Their addresses are arguments of the kernel, so
// nothing is copied to the device, and a CUDA graph stores them. Arguments of more than 4 KB need CUDA 12.1.
#include <algorithm>

#include "../math.h"
#include "device.h"
#include "launch.h"

namespace bnkern {
namespace {

constexpr int kMostSegments = 512;  // of a launch; ResNet-110 has 335 parameters
constexpr unsigned kThreads = 256;

struct PackedSegment {
  const void* gradient;
  std::uint32_t first;  // in units of kSegmentAlign values
  std::uint32_t count;
};

struct UpdatePart {
  float *values, *before, *velocity;
  BFloat16* shadow;
  std::int64_t shadow_size;
  const float *lr, *stop;
  float momentum, weight_decay;
  std::int64_t first;  // the value at which the launch begins
  int segments;
  PackedSegment segment[kMostSegments];
};

// Loads an octet of a gradient, of which only the first `valid` values exist. The others are 0.
template <class T>
BNKERN_DEVICE void load_gradient(const T* p, std::int64_t valid, float (&values)[8]) {
  if (valid >= 8 && reinterpret_cast<std::uintptr_t>(p) % sizeof(Words) == 0) {
    const Octet<T> octet = Octet<T>::load(p);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = octet[j];
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) values[j] = j < valid ? widen(p[j]) : 0.0f;
  }
}

__global__ void update_kernel(const UpdatePart p) {
  const std::int64_t i = p.first + (std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (*p.stop != 0) return;
  // Finds the last segment that begins at `i` or before it. The first segment always does.
  int segment = 0, end = p.segments;
  while (end - segment > 1) {
    const int middle = (segment + end) / 2;
    if (p.segment[middle].first <= i / kSegmentAlign)
      segment = middle;
    else
      end = middle;
  }
  const std::int64_t first = p.segment[segment].first * kSegmentAlign, valid = p.segment[segment].count - (i - first);
  if (valid <= 0) return;  // between two segments, or behind the last one
  const bool shadowed = i < p.shadow_size;
  const void* const gradient = p.segment[segment].gradient;
  float g[8], v[8], next[8];
  if (shadowed)
    load_gradient(static_cast<const BFloat16*>(gradient) + (i - first), valid, g);
  else
    load_gradient(static_cast<const float*>(gradient) + (i - first), valid, g);
  // Octet::load() requires that the kernel does not write what it loads. Here only this thread writes these octets,
  // after it has read them.
  const Octet<float> value = Octet<float>::load(p.values + i);
#pragma unroll
  for (int j = 0; j < 8; ++j) v[j] = decayed_gradient(g[j], p.weight_decay, value[j]);
  if (p.velocity) {
    const Octet<float> velocity = Octet<float>::load(p.velocity + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = next_velocity(p.momentum, velocity[j], v[j]);
    Octet<float>::of(v).store(p.velocity + i);
  }
  const float minus_lr = -*p.lr;
#pragma unroll
  for (int j = 0; j < 8; ++j) next[j] = next_parameter(value[j], minus_lr, v[j]);
  value.store(p.before + i);
  Octet<float>::of(next).store(p.values + i);
  if (shadowed) Octet<BFloat16>::of(next).store(p.shadow + i);
}

}  // namespace

std::string cuda_update(const Update& p, std::uintptr_t stream) {
  if (p.dtype != DType::kFloat32) return "update: the CUDA kernel takes float32";
  for (std::int64_t k = 0; k < p.segment_count; k += kMostSegments) {
    const Segment* const segments = p.segments + k;
    UpdatePart part{.values = static_cast<float*>(p.values),
                    .before = static_cast<float*>(p.before),
                    .velocity = static_cast<float*>(p.velocity),
                    .shadow = p.shadow,
                    .shadow_size = p.shadow_size,
                    .lr = p.lr,
                    .stop = p.stop,
                    .momentum = static_cast<float>(p.momentum),
                    .weight_decay = static_cast<float>(p.weight_decay),
                    .first = segments->first,
                    .segments = static_cast<int>(std::min<std::int64_t>(p.segment_count - k, kMostSegments)),
                    .segment = {}};
    for (int s = 0; s < part.segments; ++s) {
      if (segments[s].count >> 32) return "update: a parameter has 2^32 values or more";
      part.segment[s] = {segments[s].gradient, static_cast<std::uint32_t>(segments[s].first / kSegmentAlign),
                         static_cast<std::uint32_t>(segments[s].count)};
    }
    const Segment& last = segments[part.segments - 1];
    constexpr std::int64_t kBlock = kThreads * 8;
    const auto blocks = static_cast<unsigned>((last.first + last.count - part.first + kBlock - 1) / kBlock);
    const std::string error = launch({"update", blocks, kThreads, 0, stream}, update_kernel, part);
    if (!error.empty()) return error;
  }
  return {};
}

}  // namespace bnkern
