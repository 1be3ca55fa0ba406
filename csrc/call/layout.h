// The rules of bnkern/backends/layout.py in C++, which is faster. The tests compare the two.
#pragma once

#include "../params.h"

namespace bnkern {

// The memory layout of a tensor [N, C, ...]: its shape, and the strides of a View.
struct Layout {
  Shape shape;
  std::int64_t outer = 0, inner = 0;
};

// layout.layout: the sizes, and which of the two layouts the tensor has.
inline Shape shape_of(int ndim, const std::int64_t* sizes, const std::int64_t* strides) {
  std::int64_t s = 1;
  for (int axis = 2; axis < ndim; ++axis) s *= sizes[axis];
  return {s == 1 || (sizes[1] > 1 && strides[1] == 1), sizes[0], sizes[1], s};
}

// layout.strides: (outer, inner) in the given layout. Returns false if two strides do not describe the tensor.
inline bool view_strides(int ndim, const std::int64_t* sizes, const std::int64_t* strides, bool rows,
                         std::int64_t& outer, std::int64_t& inner) {
  if (rows && sizes[1] > 1 && strides[1] != 1) return false;
  // All rows, or the positions of a plane, must form one run with a constant stride.
  bool has_step = !rows;
  std::int64_t step = 1, expected = 1;
  for (int axis = ndim - 1; axis >= 0; axis = axis == 2 ? (rows ? 0 : -1) : axis - 1) {
    if (axis == 1) continue;
    if (axis == 0 && !rows) break;
    if (sizes[axis] == 1) continue;
    if (!has_step) {
      step = expected = strides[axis];
      has_step = true;
    } else if (strides[axis] != expected) {
      return false;
    }
    expected *= sizes[axis];
  }
  outer = rows ? (has_step ? step : sizes[1]) : strides[0];
  inner = rows ? 1 : strides[1];
  return true;
}

// The layout of an input. Returns false if two strides do not describe it.
inline bool view_layout(int ndim, const std::int64_t* sizes, const std::int64_t* strides, Layout& layout) {
  layout.shape = shape_of(ndim, sizes, strides);
  return view_strides(ndim, sizes, strides, layout.shape.rows, layout.outer, layout.inner);
}

// Whether the axes form one run: the stride of each axis is the product of the sizes of all inner axes. axes(k) returns
// the axes from the innermost to the outermost. Axes of size 1 may have any stride, unless `strict`.
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

// Whether the results for an input have its own strides, because it is contiguous or channels last. Otherwise
// layout.output_strides computes them.
inline bool keeps_strides(int ndim, const std::int64_t* sizes, const std::int64_t* strides, bool rows) {
  const auto in_order = [&](int k) { return ndim - 1 - k; };
  const auto channels_last = [&](int k) { return k == 0 ? 1 : k == ndim - 1 ? 0 : ndim - k; };
  // Torch accepts channels_last with 4 axes for any strides of axes of size 1. With another number of axes it would
  // replace these strides.
  return one_run(sizes, strides, ndim, in_order) || (rows && one_run(sizes, strides, ndim, channels_last, ndim != 4));
}

}  // namespace bnkern
