// The operands and results of the functions that take images.
#pragma once

#include <array>
#include <cstdint>

#include "../cpu/cpu.h"
#include "layout.h"
#include "tensors.h"

namespace bnkern {

[[noreturn]] inline void refuse(const char* name, const char* expected) {
  PyErr_Format(PyExc_TypeError, "%s must be %s", name, expected);
  throw PythonError();
}

// Reads a tensor on the CPU with this dtype and number of axes. Throws a TypeError for any other object.
inline Tensor operand(PyObject* object, const char* name, const char* expected, dlpack::DataType type, int ndim) {
  Tensor t;
  if (!read(object, t) || t.device.type != dlpack::kCpu || !(t.dtype == type) || t.ndim != ndim) refuse(name, expected);
  return t;
}

inline bool is_contiguous(const Tensor& t) {
  return one_run(t.shape, t.strides, t.ndim, [&](int k) { return t.ndim - 1 - k; });
}
inline bool is_channels_last(const Tensor& t) {
  constexpr std::array<int, 4> axes{1, 3, 2, 0};
  return t.ndim == 4 && one_run(t.shape, t.strides, 4, [&](int k) { return axes[k]; });
}

// Reads the input and the weight of a 3 x 3 convolution. If `flipped`, the weight is rotated by 180 degrees, and its
// first two axes are exchanged.
inline Conv3x3 conv3x3_of(PyObject* input, PyObject* weights, bool flipped) {
  constexpr const char* kInput = "a float32 tensor [N, I, H, W] on the CPU, dense in channels_last";
  constexpr const char* kWeight = "a float32 tensor [O, I, 3, 3] on the CPU that fits the input";
  const Tensor x = operand(input, "conv3x3: x", kInput, dlpack::kFloat32, 4);
  const Tensor weight = operand(weights, "conv3x3: weight", kWeight, dlpack::kFloat32, 4);
  const int output_axis = flipped ? 1 : 0, input_axis = flipped ? 0 : 1, sign = flipped ? -1 : 1;
  const std::int64_t* const step = weight.strides;
  if (!is_channels_last(x)) refuse("conv3x3: x", kInput);
  if (weight.shape[2] != 3 || weight.shape[3] != 3 || weight.shape[input_axis] != x.shape[1])
    refuse("conv3x3: weight", kWeight);
  return {
      .x = static_cast<const float*>(x.data),
      .n = x.shape[0],
      .inputs = x.shape[1],
      .outputs = weight.shape[output_axis],
      .h = x.shape[2],
      .w = x.shape[3],
      .weight = static_cast<const float*>(weight.data) + (flipped ? 2 * (step[2] + step[3]) : 0),
      .weight_output = step[output_axis],
      .weight_input = step[input_axis],
      .weight_h = sign * step[2],
      .weight_w = sign * step[3],
      .y = nullptr,
      .threads = threads(),
  };
}

// Makes a float32 tensor [N, C, H, W] in channels_last.
inline Object make_images(PyObject* like, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w,
                          float*& data) {
  const std::int64_t shape[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  void* memory;
  Object images = make(like, {dlpack::kCpu, 0}, dlpack::kFloat32, 4, shape, strides, memory);
  data = static_cast<float*>(memory);
  return images;
}

}  // namespace bnkern
