// merge: several (count, mean, M2) -> one, by Chan's formula in the order of the rows. Each thread has one channel. So
// adjacent threads read adjacent channels, and the order of the rows is the same in every run.
#include "../math.h"
#include "kernels.h"
#include "launch.h"

namespace bnkern {
namespace {

template <class T>
__global__ void merge_kernel(CudaMerge p) {
  const std::int64_t c = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.channels) return;
  const T* count = static_cast<const T*>(p.count);
  const T* mean = static_cast<const T*>(p.mean) + c;
  const T* m2 = static_cast<const T*>(p.m2) + c;
  Moments<T> total{0, 0, 0};
  for (std::int64_t k = 0; k < p.rows; ++k) {
    total = chan_merge(total, Moments<T>{count[k], mean[k * p.channels], m2[k * p.channels]});
  }
  static_cast<T*>(p.merged_mean)[c] = total.mean;
  static_cast<T*>(p.merged_m2)[c] = total.m2;
  if (c == 0 && p.merged_count) *static_cast<T*>(p.merged_count) = total.count;
}

}  // namespace

std::string cuda_merge(const CudaMerge& p, std::uintptr_t stream) {
  if (p.channels == 0) return {};
  // Blocks are small, so that with few channels each block has a multiprocessor of its own.
  constexpr unsigned kThreads = 64;
  const auto blocks = static_cast<unsigned>((p.channels + kThreads - 1) / kThreads);
  const Launch settings{"merge", blocks, kThreads, 0, stream};
  switch (p.dtype) {
    case DType::kFloat32:
      return launch(settings, merge_kernel<float>, p);
    case DType::kFloat64:
      return launch(settings, merge_kernel<double>, p);
    default:
      return "merge: statistics are float32 or float64";
  }
}

}  // namespace bnkern
