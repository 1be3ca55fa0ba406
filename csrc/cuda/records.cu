// Joins the parts of records. Each warp has one channel. Its lanes take the parts in turn, and a tree joins the lanes.
#include "records.h"

namespace bnkern {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu, kLanes = 32;

// Joins row `row` of all parts. The result is in the first lane of the warp.
template <class Sums>
BNKERN_DEVICE double join_parts(const RecordParts& parts, int count, int row, std::int64_t channel) {
  double all = Sums().row[row];  // the value without any part
  for (int k = static_cast<int>(threadIdx.x); k < count; k += int(kLanes))
    all = joined<Sums>(row, parts.at(k, row, channel), all);
#pragma unroll
  for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2)
    all = joined<Sums>(row, __shfl_down_sync(kAllLanes, all, lanes), all);
  return all;
}

__global__ void __launch_bounds__(kLanes) fold_activation_kernel(Forward p, RecordParts parts, int count) {
  const std::int64_t c = blockIdx.x;
  double row[kCentre];
#pragma unroll
  for (int r = 0; r < kCentre; ++r) row[r] = join_parts<ActivationSums>(parts, count, r, c);
  if (threadIdx.x != 0) return;
  // Moves the sums from the centre to the mean by the binomial theorem, with sum d = n * delta.
  const double n = static_cast<double>(p.shape.n * p.shape.s), delta = row[kSum1] / n;
  const double m2 = fma(-row[kSum1], delta, row[kSum2]);
  const double m3 = fma(delta, fma(2 * delta, row[kSum1], -3 * row[kSum2]), row[kSum3]);
  const double m4 = fma(delta, fma(delta, fma(-3 * delta, row[kSum1], 6 * row[kSum2]), -4 * row[kSum3]), row[kSum4]);
  const double mean = parts.at(0, kCentre, c) + delta;
  const double values[] = {n,           mean,          m2 < 0 ? 0 : m2, m3,          m4 < 0 ? 0 : m4,
                           row[kLeast], row[kLargest], row[kNonfinite], row[kActive]};
  for (int r = 0; r < 9; ++r) p.record[r * p.shape.c + c] = values[r];
}

// Joins the parts of GRADIENT, of AFFINE, or of both.
__global__ void __launch_bounds__(kLanes) fold_sums_kernel(Backward p, RecordSpace space, int count) {
  const std::int64_t c = blockIdx.x, channels = p.shape.c;
  const bool writes = threadIdx.x == 0;
  if (space.gradient.data) {
    if (writes) p.record_gradient[c] = static_cast<double>(p.shape.n * p.shape.s);
    for (int r = 0; r < kGradientRows; ++r) {
      const double all = join_parts<GradientSums>(space.gradient, count, r, c);
      if (writes) p.record_gradient[(r + 1) * channels + c] = all;
    }
  }
  if (space.affine.data) {
    for (int r = 0; r < kAffineRows; ++r) {
      const double all = join_parts<AffineSums>(space.affine, count, r, c);
      if (writes) p.record_affine[(r < kWeightAbs ? r + 1 : r + 2) * channels + c] = all;
    }
  }
}

}  // namespace

std::string fold_records(const Forward& p, const RecordSpace& space, int parts, std::uintptr_t stream) {
  return launch({"record", static_cast<unsigned>(p.shape.c), kLanes, 0, stream}, fold_activation_kernel, p,
                space.activation, parts);
}
std::string fold_records(const Backward& p, const RecordSpace& space, int parts, std::uintptr_t stream) {
  return launch({"record", static_cast<unsigned>(p.shape.c), kLanes, 0, stream}, fold_sums_kernel, p, space, parts);
}

}  // namespace bnkern
