// The records that kernels write beside their results (bnkern/backends/records.py). A thread adds up its own values,
// and a block adds up the sums of its threads. The sums of a block are a part. Parts are stored in the workspace, one
// row after the other. One small launch after the others joins the parts in order and writes the record. The sums of g
// and of g * xhat are results of the phase itself, so parts do not have them.
#pragma once

#include "device.h"

namespace bnkern {

// The rows of a part. For x: the sums of d^1 to d^4 for distances d from the channel's centre, the least and the
// largest value, the number of values that are not finite, the number of values of y above zero, and the centre. For
// dx: the rows of GRADIENT without the count. For the summands: the rows of AFFINE without the two sums.
enum ActivationRow { kSum1, kSum2, kSum3, kSum4, kLeast, kLargest, kNonfinite, kActive, kCentre, kActivationRows };
enum GradientRow { kSum, kAbsolute, kSquares, kPositive, kNegative, kZero, kNonfiniteDx, kGradientRows };
enum AffineRow { kBiasAbs, kBiasSigns, kBiasNonzero, kWeightAbs, kWeightSigns, kWeightNonzero, kAffineRows };

struct RecordParts {
  double* data;
  int rows;
  std::int64_t channels;
  BNKERN_DEVICE double& at(int part, int row, std::int64_t channel) const {
    return data[(std::int64_t(part) * rows + row) * channels + channel];
  }
};

// The parts' memory in the workspace, behind the memory that calls without records need.
struct RecordSpace {
  RecordParts activation, gradient, affine;
};
inline bool records_gradient(const Backward& p) { return p.record_gradient && p.input && p.dx; }
inline bool records_affine(const Backward& p) { return p.record_affine && p.sums; }
inline std::int64_t record_bytes(const Forward& p, std::int64_t parts) {
  return p.record && p.normalize ? parts * kActivationRows * p.shape.c * std::int64_t{sizeof(double)} : 0;
}
inline std::int64_t record_bytes(const Backward& p, std::int64_t parts) {
  const int rows = (records_gradient(p) ? kGradientRows : 0) + (records_affine(p) ? kAffineRows : 0);
  return parts * rows * p.shape.c * std::int64_t{sizeof(double)};
}
template <class Call>
RecordSpace record_space(const Call& p, const CudaWorkspace& memory, std::int64_t parts) {
  const std::int64_t c = p.shape.c;
  double* const first = reinterpret_cast<double*>(behind_signals(memory) + pairs_bytes(parts, c));
  if constexpr (std::is_same_v<Call, Forward>) {
    return {{p.record ? first : nullptr, kActivationRows, c}, {}, {}};
  } else {
    double* const second = first + (records_gradient(p) ? parts * kGradientRows * c : 0);
    return {{},
            {records_gradient(p) ? first : nullptr, kGradientRows, c},
            {records_affine(p) ? second : nullptr, kAffineRows, c}};
  }
}

// Joins `parts` parts and writes the records. save_sums() writes those rows that are results of the phase itself.
std::string fold_records(const Forward& p, const RecordSpace& space, int parts, std::uintptr_t stream);
std::string fold_records(const Backward& p, const RecordSpace& space, int parts, std::uintptr_t stream);

// ---- the sums of a few values, those of one channel in a tile, before they are added to the thread's sums
//
// finite() tests a sum that cannot be finite if a value is not. If it returns false, which is rare, add_nonfinite() is
// called for each value.

BNKERN_DEVICE bool is_finite(float x) { return fabsf(x) < float_of(0x7f800000u); }

struct ActivationSums {
  float row[kCentre];

  BNKERN_DEVICE ActivationSums() : row{0, 0, 0, 0, float_of(0x7f800000u), float_of(0xff800000u), 0, 0} {}
  BNKERN_DEVICE void add(float x, float centre, bool active) {
    add_powers(x - centre);
    add_rest(x, active);
  }
  BNKERN_DEVICE void add_powers(float d) {
    const float square = d * d;
    row[kSum1] += d;
    row[kSum2] += square;
    row[kSum3] = fma(square, d, row[kSum3]);
    row[kSum4] = fma(square, square, row[kSum4]);
  }
  BNKERN_DEVICE void add_rest(float x, bool active) {
    row[kLeast] = least(x, row[kLeast]);
    row[kLargest] = largest(x, row[kLargest]);
    row[kActive] += active ? 1.0f : 0.0f;
  }
  BNKERN_DEVICE bool finite() const { return is_finite(row[kSum4]); }
  BNKERN_DEVICE void add_nonfinite(float x) { row[kNonfinite] += is_finite(x) ? 0.0f : 1.0f; }
};
struct GradientSums {
  float row[kGradientRows] = {};

  BNKERN_DEVICE void add(float dx) {
    row[kSum] += dx;
    row[kAbsolute] += fabsf(dx);
    row[kSquares] = fma(dx, dx, row[kSquares]);
    row[kPositive] += dx > 0 ? 1.0f : 0.0f;
    row[kNegative] += dx < 0 ? 1.0f : 0.0f;
    row[kZero] += dx == 0 ? 1.0f : 0.0f;
  }
  BNKERN_DEVICE bool finite() const { return is_finite(row[kAbsolute]); }
  BNKERN_DEVICE void add_nonfinite(float dx) { row[kNonfiniteDx] += is_finite(dx) ? 0.0f : 1.0f; }
};
struct AffineSums {
  float row[kAffineRows] = {};

  BNKERN_DEVICE void add(float g, float xhat) {
    add_summand(g, kBiasAbs);
    add_summand(g * xhat, kWeightAbs);
  }

 private:
  BNKERN_DEVICE void add_summand(float d, int first) {
    row[first] += fabsf(d);
    row[first + 1] += d > 0 ? 1.0f : d < 0 ? -1.0f : 0.0f;
    row[first + 2] += d != 0 ? 1.0f : 0.0f;
  }
};

// Joins two values of a row of Sums. The least and the largest value are compared, and all others are added.
template <class Sums, class A>
BNKERN_DEVICE A joined(int row, A a, A b) {
  if constexpr (std::is_same_v<Sums, ActivationSums>) {
    if (row == kLeast) return least(a, b);
    if (row == kLargest) return largest(a, b);
  }
  return a + b;
}

}  // namespace bnkern
