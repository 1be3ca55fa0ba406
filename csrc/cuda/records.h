// What kernels record beside their results (bnkern/backends/records.py). A thread adds up what it has in hand, a block
// its threads' sums: that is a part, one row after the other, in the workspace. One small launch behind the others
// joins the parts, in their order, and writes the record. Sums of g and of g * xhat are the phase's own, and no part's.
#pragma once

#include "device.h"

namespace bnkern {

// Rows of a part. Of x: sums of d^1 to d^4 for distances d from the channel's centre, the least and the largest value,
// how many of y are above zero, and that centre. Of dx: GRADIENT but for its count. Of the summands: AFFINE but for
// its two sums.
enum ActivationRow { kSum1, kSum2, kSum3, kSum4, kLeast, kLargest, kActive, kCentre, kActivationRows };
enum GradientRow { kSum, kAbsolute, kSquares, kPositive, kNegative, kZero, kGradientRows };
enum AffineRow { kBiasAbs, kBiasSigns, kBiasNonzero, kWeightAbs, kWeightSigns, kWeightNonzero, kAffineRows };

struct RecordParts {
  double* data;
  int rows;
  std::int64_t channels;
  BNKERN_DEVICE double& at(int part, int row, std::int64_t channel) const {
    return data[(std::int64_t(part) * rows + row) * channels + channel];
  }
};

// In the workspace, behind what calls without records need.
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

// Joins so many parts and writes the records. What the phase itself knows of them is written by save_sums().
std::string fold_records(const Forward& p, const RecordSpace& space, int parts, std::uintptr_t stream);
std::string fold_records(const Backward& p, const RecordSpace& space, int parts, std::uintptr_t stream);

// ---- of a few values, a tile's of one channel, before they join the thread's sums

struct ActivationSums {
  float row[kCentre];

  BNKERN_DEVICE ActivationSums() : row{0, 0, 0, 0, float_of(0x7f800000u), float_of(0xff800000u), 0} {}
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

// Joins a value of a row of some of these Sums to another: only what is least or largest is not added.
template <class Sums, class A>
BNKERN_DEVICE A joined(int row, A a, A b) {
  if constexpr (std::is_same_v<Sums, ActivationSums>) {
    if (row == kLeast) return least(a, b);
    if (row == kLargest) return largest(a, b);
  }
  return a + b;
}

}  // namespace bnkern
