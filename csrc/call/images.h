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

// Reads a tensor with this device, dtype and number of axes. Throws a TypeError for any other object.
inline Tensor operand(PyObject* object, const char* name, const char* expected, const dlpack::Device& device,
                      dlpack::DataType type, int ndim) {
  Tensor t;
  if (!read(object, t) || !(t.device == device) || !(t.dtype == type) || t.ndim != ndim) refuse(name, expected);
  return t;
}
// The same on the CPU.
inline Tensor operand(PyObject* object, const char* name, const char* expected, dlpack::DataType type, int ndim) {
  return operand(object, name, expected, {dlpack::kCpu, 0}, type, ndim);
}

inline bool is_contiguous(const Tensor& t) {
  return one_run(t.shape, t.strides, t.ndim, [&](int k) { return t.ndim - 1 - k; });
}
inline bool is_channels_last(const Tensor& t) {
  constexpr std::array<int, 4> axes{1, 3, 2, 0};
  return t.ndim == 4 && one_run(t.shape, t.strides, 4, [&](int k) { return axes[k]; });
}

// The weight of a 3 x 3 convolution. Strides count elements.
struct Weight3x3 {
  const void* data;
  std::int64_t inputs, outputs, output, input, h, w;  // the last four are strides
};

// Reads a weight of the dtype and device of the convolution's input x. If `flipped`, it is rotated by 180 degrees, and
// its first two axes are exchanged.
inline Weight3x3 weight3x3_of(PyObject* object, const Tensor& x, bool flipped, const char* name, const char* expected) {
  const Tensor t = operand(object, name, expected, x.device, x.dtype, 4);
  const int output_axis = flipped ? 1 : 0, input_axis = flipped ? 0 : 1, sign = flipped ? -1 : 1;
  const std::int64_t* const step = t.strides;
  if (t.shape[2] != 3 || t.shape[3] != 3 || t.shape[input_axis] != x.shape[1]) refuse(name, expected);
  const std::int64_t first = flipped ? 2 * (step[2] + step[3]) : 0;
  return {
      .data = static_cast<const char*>(t.data) + first * (t.dtype.bits / 8),
      .inputs = t.shape[input_axis],
      .outputs = t.shape[output_axis],
      .output = step[output_axis],
      .input = step[input_axis],
      .h = sign * step[2],
      .w = sign * step[3],
  };
}

// Reads the input and the weight of a 3 x 3 convolution in float32 on the CPU.
inline Conv3x3 conv3x3_of(PyObject* input, PyObject* weights, bool flipped) {
  constexpr const char* kInput = "a float32 tensor [N, I, H, W] on the CPU, dense in channels_last";
  constexpr const char* kWeight = "a float32 tensor [O, I, 3, 3] on the CPU that fits the input";
  const Tensor x = operand(input, "conv3x3: x", kInput, dlpack::kFloat32, 4);
  if (!is_channels_last(x)) refuse("conv3x3: x", kInput);
  const Weight3x3 weight = weight3x3_of(weights, x, flipped, "conv3x3: weight", kWeight);
  return {
      .x = static_cast<const float*>(x.data),
      .n = x.shape[0],
      .inputs = weight.inputs,
      .outputs = weight.outputs,
      .h = x.shape[2],
      .w = x.shape[3],
      .weight = static_cast<const float*>(weight.data),
      .weight_output = weight.output,
      .weight_input = weight.input,
      .weight_h = weight.h,
      .weight_w = weight.w,
      .y = nullptr,
      .threads = threads(),
  };
}

// Makes a tensor [N, C, H, W] in channels_last, on the device and of the dtype of a tensor `like`, which was read.
inline Object make_images(PyObject* like, const Tensor& read, std::int64_t n, std::int64_t c, std::int64_t h,
                          std::int64_t w, void*& data) {
  const std::int64_t shape[] = {n, c, h, w}, strides[] = {h * w * c, 1, w * c, c};
  return make(like, read.device, read.dtype, 4, shape, strides, data);
}
// Makes a float32 tensor [N, C, H, W] in channels_last on the CPU.
inline Object make_images(PyObject* like, std::int64_t n, std::int64_t c, std::int64_t h, std::int64_t w,
                          float*& data) {
  Tensor kind;
  kind.device = {dlpack::kCpu, 0}, kind.dtype = dlpack::kFloat32;
  void* memory;
  Object images = make_images(like, kind, n, c, h, w, memory);
  data = static_cast<float*>(memory);
  return images;
}

}  // namespace bnkern
