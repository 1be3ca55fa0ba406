// bnkern/backends/layout.py once more, for the calls of every step. The tests hold the two to each other.
#pragma once

#include "../params.h"

namespace bnkern {

// How a tensor [N, C, ...] lies in memory: its shape, and the strides of a View.
struct Layout {
  Shape shape;
  std::int64_t outer = 0, inner = 0;
};

// Layout.layout: sizes, and which of the two layouts.
inline Shape shape_of(int ndim, const std::int64_t* sizes, const std::int64_t* strides) {
  std::int64_t s = 1;
  for (int axis = 2; axis < ndim; ++axis) s *= sizes[axis];
  return {s == 1 || (sizes[1] > 1 && strides[1] == 1), sizes[0], sizes[1], s};
}

// layout.strides: (outer, inner) in the given layout. False where the tensor cannot be addressed so.
inline bool view_strides(int ndim, const std::int64_t* sizes, const std::int64_t* strides, bool rows,
                         std::int64_t& outer, std::int64_t& inner) {
  if (rows && sizes[1] > 1 && strides[1] != 1) return false;
  // The axes that must form one evenly strided run: all rows, or the positions of a plane.
  bool known = !rows;
  std::int64_t step = 1, expected = 1;
  for (int axis = ndim - 1; axis >= 0; axis = axis == 2 ? (rows ? 0 : -1) : axis - 1) {
    if (axis == 1) continue;
    if (axis == 0 && !rows) break;
    if (sizes[axis] == 1) continue;
    if (!known) {
      step = expected = strides[axis];
      known = true;
    } else if (strides[axis] != expected) {
      return false;
    }
    expected *= sizes[axis];
  }
  outer = rows ? (known ? step : sizes[1]) : strides[0];
  inner = rows ? 1 : strides[1];
  return true;
}

// The layout of an input. False where its elements cannot be addressed by two strides.
inline bool view_layout(int ndim, const std::int64_t* sizes, const std::int64_t* strides, Layout& layout) {
  layout.shape = shape_of(ndim, sizes, strides);
  return view_strides(ndim, sizes, strides, layout.shape.rows, layout.outer, layout.inner);
}

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

// Whether results for such an input have its own strides: it is contiguous or channels last. Of another input
// layout.output_strides knows.
inline bool keeps_strides(int ndim, const std::int64_t* sizes, const std::int64_t* strides, bool rows) {
  const auto in_order = [&](int k) { return ndim - 1 - k; };
  const auto channels_last = [&](int k) { return k == 0 ? 1 : k == ndim - 1 ? 0 : ndim - k; };
  // torch knows channels_last of 4 axes whatever the strides of size 1; of others it would make new strides there.
  return one_run(sizes, strides, ndim, in_order) || (rows && one_run(sizes, strides, ndim, channels_last, ndim != 4));
}

}  // namespace bnkern
