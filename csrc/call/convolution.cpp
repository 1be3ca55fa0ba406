// Calls of the CPU's convolution and image kernels with torch's tensors.
#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>

#include "../cpu/cpu.h"
#include "calls.h"
#include "images.h"

namespace bnkern {
namespace {

std::array<std::int64_t, 2> pair(PyObject* object, const char* name) {
  if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 2) refuse(name, "a pair of ints");
  std::array<std::int64_t, 2> values;
  for (int i = 0; i < 2; ++i) values[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(object, i));
  if (PyErr_Occurred()) throw PythonError();
  return values;
}

// conv3x3(x, weight, flipped) -> y, for float32 in channels_last. If `flipped`, the weight is rotated by 180 degrees,
// and its first two axes are exchanged.
PyObject* conv3x3(PyObject* const* args) {
  Conv3x3 p = conv3x3_of(args[0], args[1], args[2] == Py_True);
  Object y = make_images(args[0], p.n, p.outputs, p.h, p.w, p.y);
  run_released(cpu_kernels().conv3x3, p);
  return y.release();
}

// conv_direct(x, weight, stride, padding, size) -> y, for float32 in channels_last. `size` is None, or the size (H, W)
// of the input of a convolution whose input gradient is computed from x, the gradient of its output.
PyObject* conv_direct(PyObject* const* args) {
  constexpr const char* kInput = "a float32 tensor [N, C, H, W] on the CPU, dense in channels_last";
  constexpr const char* kWeight = "a float32 tensor [O, I, rows, columns] on the CPU that fits x";
  const Tensor x = operand(args[0], "conv_direct: x", kInput, dlpack::kFloat32, 4);
  const Tensor weight = operand(args[1], "conv_direct: weight", kWeight, dlpack::kFloat32, 4);
  const auto stride = pair(args[2], "conv_direct: stride"), padding = pair(args[3], "conv_direct: padding");
  if (std::min(stride[0], stride[1]) < 1) refuse("conv_direct: stride", "at least 1");
  const bool transposed = args[4] != Py_None;
  const int output_axis = transposed ? 1 : 0, input_axis = transposed ? 0 : 1;
  const std::int64_t *const size = x.shape, *const kernel = weight.shape + 2;
  if (!is_channels_last(x)) refuse("conv_direct: x", kInput);
  if (weight.shape[input_axis] != size[1] || std::min(kernel[0], kernel[1]) < 1) refuse("conv_direct: weight", kWeight);
  const auto outer = [&](int i, std::int64_t length) { return (length + 2 * padding[i] - kernel[i]) / stride[i] + 1; };
  std::array<std::int64_t, 2> y_size{outer(0, size[2]), outer(1, size[3])};
  if (transposed) y_size = pair(args[4], "conv_direct: size");
  for (int i = 0; i < 2; ++i)
    if (y_size[i] < 1 || (transposed && outer(i, y_size[i]) != size[2 + i]))
      refuse("conv_direct: size", "the size of an image whose convolution has the size of x");
  ConvDirect p{
      .x = static_cast<const float*>(x.data),
      .n = size[0],
      .inputs = size[1],
      .h = size[2],
      .w = size[3],
      .weight = static_cast<const float*>(weight.data),
      .weight_output = weight.strides[output_axis],
      .weight_input = weight.strides[input_axis],
      .weight_h = weight.strides[2],
      .weight_w = weight.strides[3],
      .kernel_h = kernel[0],
      .kernel_w = kernel[1],
      .stride_h = stride[0],
      .stride_w = stride[1],
      .padding_h = padding[0],
      .padding_w = padding[1],
      .transposed = transposed,
      .y = nullptr,
      .outputs = weight.shape[output_axis],
      .y_h = y_size[0],
      .y_w = y_size[1],
      .threads = threads(),
  };
  Object y = make_images(args[0], p.n, p.outputs, p.y_h, p.y_w, p.y);
  run_released(cpu_kernels().conv_direct, p);
  return y.release();
}

// Whether the tensor [N, C, H, W] has unit stride along channels or columns.
bool read_image(const Tensor& t, Image& image) {
  const std::int64_t *const size = t.shape, *const step = t.strides;
  const auto unit = [&](int axis) { return step[axis] == 1 || (step[1] != 1 && size[axis] == 1); };
  if (!unit(1) && !unit(3)) return false;
  image = {t.data,
           size[0],
           size[1],
           size[2],
           size[3],
           step[0],
           unit(1) ? 1 : step[1],
           step[2],
           unit(3) && step[1] != 1 ? 1 : step[3]};
  return true;
}

// conv_grad_signs(x, dy, kernel, stride, padding, wanted, winograd) -> (sum, abs_sum, sign_sum, nonzero), or None if
// the kernels cannot read the strides of x or dy.
PyObject* conv_grad_signs(PyObject* const* args) {
  ConvGradSigns p{};
  Tensor x, dy;
  if (!read(args[0], x) || !read(args[1], dy) || x.ndim != 4 || dy.ndim != 4 || !(x.dtype == dy.dtype) ||
      x.device.type != dlpack::kCpu || dy.device.type != dlpack::kCpu)
    Py_RETURN_NONE;
  if (!read_image(x, p.x) || !read_image(dy, p.dy)) Py_RETURN_NONE;
  int code = 0;
  while (code < 4 && !(dlpack::kTypes[code] == x.dtype)) ++code;
  if (code == 4) refuse("conv_grad_signs: x", "of a floating point dtype");
  p.dtype = static_cast<DType>(code);
  const auto kernel = pair(args[2], "conv_grad_signs: kernel"), stride = pair(args[3], "conv_grad_signs: stride"),
             padding = pair(args[4], "conv_grad_signs: padding");
  PyObject* const wanted = args[5];
  if (!PyTuple_Check(wanted) || PyTuple_GET_SIZE(wanted) != 4) refuse("conv_grad_signs: wanted", "4 booleans");
  p.kernel_h = kernel[0], p.kernel_w = kernel[1], p.stride_h = stride[0], p.stride_w = stride[1];
  p.padding_h = padding[0], p.padding_w = padding[1];
  const std::int64_t shape[] = {dy.shape[1], x.shape[1], kernel[0], kernel[1]};
  const std::int64_t strides[] = {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
  const auto sums = p.dtype == DType::kFloat64 ? dlpack::kFloat64 : dlpack::kFloat32;
  Object results[4];
  void* data[4] = {};
  for (int i = 0; i < 4; ++i)
    if (PyTuple_GET_ITEM(wanted, i) == Py_True)
      results[i] = make(args[0], x.device, i < 2 ? sums : dlpack::kInt32, 4, shape, strides, data[i]);
  p.sum = data[0], p.abs_sum = data[1];
  p.sign_sum = static_cast<std::int32_t*>(data[2]), p.nonzero = static_cast<std::int32_t*>(data[3]);
  p.winograd = args[6] == Py_True;
  p.threads = threads();
  run_released(cpu_kernels().conv_grad_signs, p);
  return tuple_of(results);
}

// augment(images, labels, chosen, table, out, labels_out, random, seed, epoch): see Augment in params.h. `chosen` has
// the indices of the batch's images.
PyObject* augment(PyObject* const* args) {
  const Tensor images = operand(args[0], "augment: images", "uint8 [n, 3, 32, 32]", dlpack::kUInt8, 4);
  const Tensor labels = operand(args[1], "augment: labels", "int64 [n]", dlpack::kInt64, 1);
  const Tensor chosen = operand(args[2], "augment: chosen", "int64 [B]", dlpack::kInt64, 1);
  Tensor table, out;
  int code = 0;
  if (!read(args[4], out) || out.ndim != 4 || out.device.type != dlpack::kCpu)
    refuse("augment: out", "a tensor [B, 3, 32, 32] on the CPU");
  while (code < 4 && !(dlpack::kTypes[code] == out.dtype)) ++code;
  if (code == 4) refuse("augment: out", "of a floating point dtype");
  table = operand(args[3], "augment: table", "[3, 256] of the dtype of out", out.dtype, 2);
  const Tensor labels_out = operand(args[5], "augment: labels_out", "int64 [B]", dlpack::kInt64, 1);
  const bool rows = !is_contiguous(out);
  const std::int64_t count = out.shape[0];
  const auto has_images = [](const Tensor& t) { return t.shape[1] == 3 && t.shape[2] == 32 && t.shape[3] == 32; };
  if (!has_images(images) || !is_contiguous(images)) refuse("augment: images", "uint8 [n, 3, 32, 32], contiguous");
  if (!has_images(out) || (rows && !is_channels_last(out))) refuse("augment: out", "dense, [B, 3, 32, 32]");
  if (table.shape[0] != 3 || table.shape[1] != 256 || !is_contiguous(table)) refuse("augment: table", "[3, 256]");
  if (labels.shape[0] != images.shape[0] || !is_contiguous(labels)) refuse("augment: labels", "int64 [n], contiguous");
  if (chosen.shape[0] != count || !is_contiguous(chosen)) refuse("augment: chosen", "int64 [B], contiguous");
  if (labels_out.shape[0] != count || !is_contiguous(labels_out))
    refuse("augment: labels_out", "int64 [B], contiguous");
  const Augment p{
      .images = static_cast<const std::uint8_t*>(images.data),
      .labels = static_cast<const std::int64_t*>(labels.data),
      .chosen = static_cast<const std::int64_t*>(chosen.data),
      .count = count,
      .table = table.data,
      .out = out.data,
      .labels_out = static_cast<std::int64_t*>(labels_out.data),
      .dtype = static_cast<DType>(code),
      .rows = rows,
      .random = args[6] == Py_True,
      .seed = PyLong_AsUnsignedLongLongMask(args[7]),
      .epoch = static_cast<std::uint32_t>(PyLong_AsUnsignedLongMask(args[8])),
      .threads = threads(),
  };
  if (PyErr_Occurred()) throw PythonError();
  run_released(cpu_kernels().augment, p);
  Py_RETURN_NONE;
}

}  // namespace

bool add_cpu_functions(PyObject* module) {
  static PyMethodDef methods[] = {
      method<conv3x3, 3>("conv3x3", "conv3x3(x, weight, flipped) -> y; see Conv3x3 in csrc/cpu/cpu.h."),
      method<conv_direct, 5>("conv_direct",
                             "conv_direct(x, weight, stride, padding, size) -> y; see ConvDirect in csrc/cpu/cpu.h."),
      method<conv_grad_signs, 7>(
          "conv_grad_signs",
          "conv_grad_signs(x, dy, kernel, stride, padding, wanted, winograd) -> four tensors, or "
          "None for each that is not requested. Returns None if it cannot read the strides."),
      method<augment, 9>("augment",
                         "augment(images, labels, chosen, table, out, labels_out, random, seed, epoch): a batch of "
                         "CIFAR images; see Augment in csrc/params.h."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
