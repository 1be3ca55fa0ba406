// The choice of bnkern/backends/layout.py for a tensor whose elements lie without gaps or overlaps, as outputs do.
// The tests hold the two to each other.
#pragma once

#include "params.h"

namespace bnkern {

// How a tensor [N, C, ...] lies in memory: its shape, and the strides of a View.
struct Layout {
  Shape shape;
  std::int64_t outer, inner;
};

// Whether the axes, given from the innermost to the outermost, form one run: each axis' stride is the product of the
// sizes within. Axes of size 1 may have any, unless `strict`.
template <class Axes>
bool one_run(const std::int64_t* sizes, const std::int64_t* strides, int count, Axes axes, bool strict = false) {
  std::int64_t expected = 1;
  for (int k = 0; k < count; ++k) {
    const int axis = axes(k);
    if (strides[axis] != expected && (strict || sizes[axis] != 1)) return false;
    expected *= sizes[axis];
  }
  return true;
}

// The layout where the tensor is dense: contiguous, or channels last. False where it is neither, or empty.
inline bool dense_layout(int ndim, const std::int64_t* sizes, const std::int64_t* strides, Layout& layout) {
  const std::int64_t n = sizes[0], c = sizes[1];
  std::int64_t s = 1;
  for (int axis = 2; axis < ndim; ++axis) s *= sizes[axis];
  if (n * c * s == 0) return false;
  const bool rows = s == 1 || (c > 1 && strides[1] == 1);
  const auto in_order = [&](int k) { return ndim - 1 - k; };
  const auto channels_last = [&](int k) { return k == 0 ? 1 : k == ndim - 1 ? 0 : ndim - k; };
  // torch knows channels_last of 4 axes whatever the strides of size 1; of others it would make new strides there.
  if (!one_run(sizes, strides, ndim, in_order) && !(rows && one_run(sizes, strides, ndim, channels_last, ndim != 4)))
    return false;
  layout.shape = {rows, n, c, s};
  layout.outer = rows ? c : strides[0];
  layout.inner = rows ? 1 : strides[1];
  return true;
}

}  // namespace bnkern
