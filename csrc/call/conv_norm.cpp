// Calls of the CPU's convolution between two batch norms (csrc/cpu/conv_norm.h) with torch's tensors.
#include "calls.h"
#include "images.h"
#include "operands.h"

namespace bnkern {
namespace {

constexpr const char* kNorm = "a call for float32 tensors [N, C, H, W] on the CPU, dense in channels_last";

// Reads the tensor that a batch norm normalises.
void read_input(PyObject* object, Input& x, const char* name) {
  if (!x.read_from(object) || !x.on_cpu() || x.dtype() != DType::kFloat32 || !is_channels_last(x.tensor()))
    refuse(name, kNorm);
}

// Reads images of the sizes of x, or None.
float* images_like(PyObject* object, const Input& x, const char* name) {
  View view;
  if (!x.read_alike(object, view) || (view && view.outer != x.channels())) refuse(name, kNorm);
  return static_cast<float*>(view.data);
}

// conv_norm_forward(call, mean, invstd, keep, weight, statistics) -> (y, mask, r, mean, invstd)
//   call        the ForwardCall of the norm before the convolution, or its input y itself
//   keep        whether y is returned
//   statistics  the ForwardCall of the norm behind it, without an x, or None
PyObject* conv_norm_forward(PyObject* const* args) {
  ConvNorm p{};
  Object outputs[5];
  const bool normalizes = PyTuple_Check(args[0]);
  if (normalizes) check_forward_call(args[0]);
  PyObject* const images = normalizes ? Fields<F>(args[0])[F::x] : args[0];
  Input x;
  read_input(images, x, "conv_norm_forward: x");
  p.conv = conv3x3_of(images, args[4], false);
  if (normalizes) {
    const Fields<F> field(args[0]);
    if (!read_forward(field, x, p.input) || p.input.record || !x.read_statistic(args[1], p.input.mean) ||
        !x.read_statistic(args[2], p.input.spread) || !p.input.mean || !p.input.spread)
      refuse("conv_norm_forward: call", kNorm);
    images_like(field[F::residual], x, "conv_norm_forward: residual");
    Results results(x);
    if (args[3] == Py_True) {
      float* y;
      outputs[0] = make_images(images, p.conv, p.conv.inputs, y);
      p.input.y = {y, p.conv.inputs, 1};
    }
    if (has_mask(field, p.input)) p.input.mask = results.mask(outputs[1]);
  }
  outputs[2] = make_images(images, p.conv, p.conv.outputs, p.conv.y);
  if (args[5] != Py_None) {
    check_forward_call(args[5]);
    Input r;
    read_input(outputs[2].get(), r, "conv_norm_forward: r");
    if (!read_running(Fields<F>(args[5]), r, p.output)) refuse("conv_norm_forward: statistics", kNorm);
    p.output.shape = r.shape();
    Results results(r);
    p.output.mean = results.statistic(outputs[3]), p.output.spread = results.statistic(outputs[4]);
  }
  run_released(cpu_kernels().conv_norm_forward, p);
  return tuple_of(outputs);
}

// conv_norm_backward(output, sum g, sum g * xhat, weight, input, y, shortcut, needs) -> (g, dweight, sum g, sum g *
// xhat)
//   output    the BackwardCall of the norm behind the convolution, whose dy is the gradient g before its activation
//   input     the BackwardCall of the norm before it, without a dy, or None
//   y         the convolution's input, or None if `input` is to recompute it
//   shortcut  a gradient that is added to that of y, or None
//   needs     whether g of the input's norm (or without a norm the gradient of y) and dweight are needed
PyObject* conv_norm_backward(PyObject* const* args) {
  ConvNormBackward p{};
  Object outputs[4];
  check_backward_call(args[0]);
  const Fields<B> behind(args[0]);
  Input r, x;
  read_input(behind[B::x], r, "conv_norm_backward: r");
  if (!read_backward(behind, r, p.output) || !r.read_statistic(args[1], p.output.sum_dy) ||
      !r.read_statistic(args[2], p.output.sum_dy_xhat) || !p.output.mean || !p.output.invstd || !p.output.sum_dy ||
      !p.output.sum_dy_xhat || p.output.act != Activation::none)
    refuse("conv_norm_backward: output", kNorm);
  images_like(behind[B::dy], r, "conv_norm_backward: g");
  p.conv = conv3x3_of(behind[B::x], args[3], true);
  const bool has_norm = args[4] != Py_None;
  if (has_norm) check_backward_call(args[4]);
  PyObject* const images = has_norm ? Fields<B>(args[4])[B::x] : args[5];
  read_input(images, x, "conv_norm_backward: x");
  if (x.channels() != p.conv.outputs || x.count() != r.count() || x.shape().n != r.shape().n)
    refuse("conv_norm_backward: x", "of the size of the convolution's input");
  if (has_norm) {
    const Fields<B> before(args[4]);
    p.input.x = x.view(), p.input.shape = x.shape();
    if (!x.read_channels(before[B::weight], p.input.weight) || !x.read_channels(before[B::bias], p.input.bias) ||
        !x.read_statistic(before[B::mean], p.input.mean) || !x.read_statistic(before[B::invstd], p.input.invstd) ||
        !x.read_run(before[B::mask], dlpack::kUInt8, mask_bytes(x.shape()), p.input.mask) ||
        !read_activation(before[B::act], p.input.act) || !p.input.mean || !p.input.invstd)
      refuse("conv_norm_backward: input", kNorm);
  }
  p.y = images_like(args[5], x, "conv_norm_backward: y");
  p.shortcut = images_like(args[6], x, "conv_norm_backward: shortcut");
  PyObject* const needs = args[7];
  if (!PyTuple_Check(needs) || PyTuple_GET_SIZE(needs) != 2) refuse("conv_norm_backward: needs", "2 booleans");
  if (PyTuple_GET_ITEM(needs, 0) == Py_True) {
    outputs[0] = make_images(images, p.conv, p.conv.outputs, p.conv.y);
    if (has_norm) {
      Results results(x);
      p.input.sum_dy = results.statistic(outputs[2]), p.input.sum_dy_xhat = results.statistic(outputs[3]);
    }
  }
  if (PyTuple_GET_ITEM(needs, 1) == Py_True) {
    const std::int64_t shape[] = {p.conv.inputs, p.conv.outputs, 3, 3};
    const std::int64_t strides[] = {p.conv.outputs * 9, 9, 3, 1};
    void* data;
    outputs[1] = make(images, x.tensor().device, dlpack::kFloat32, 4, shape, strides, data);
    p.dweight = static_cast<float*>(data);
  }
  run_released(cpu_kernels().conv_norm_backward, p);
  return tuple_of(outputs);
}

}  // namespace

bool add_conv_norm(PyObject* module) {
  static PyMethodDef methods[] = {
      method<conv_norm_forward, 6>("conv_norm_forward",
                                   "conv_norm_forward(call, mean, invstd, keep, weight, statistics) -> (y, mask, r, "
                                   "mean, invstd); see ConvNorm in csrc/cpu/cpu.h."),
      method<conv_norm_backward, 8>("conv_norm_backward",
                                    "conv_norm_backward(output, sum g, sum g * xhat, weight, input, y, shortcut, "
                                    "needs) -> (g, dweight, sum g, sum g * xhat); see ConvNormBackward in "
                                    "csrc/cpu/cpu.h."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
