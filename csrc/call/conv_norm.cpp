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

// conv_norm_forward(call, mean, invstd, keep, weight, bias, statistics) -> (y, mask, r, mean, invstd)
//   call        the ForwardCall of the norm before the convolution, or its input y itself
//   keep        whether y is returned
//   statistics  the ForwardCall of the norm behind it, without an x, or None. Without training, mean and invstd are
//               those of the running statistics
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
    if (!read_forward(field, x, p.input) || !x.read_statistic(args[1], p.input.mean) ||
        !x.read_statistic(args[2], p.input.spread) || !p.input.mean || !p.input.spread)
      refuse("conv_norm_forward: call", kNorm);
    images_like(field[F::residual], x, "conv_norm_forward: residual");
    Results results(x);
    if (args[3] == Py_True) {
      float* y;
      outputs[0] = make_images(images, p.conv.n, p.conv.inputs, p.conv.h, p.conv.w, y);
      p.input.y = {y, p.conv.inputs, 1};
    }
    if (has_mask(field, p.input)) p.input.mask = results.mask(outputs[1]);
  }
  outputs[2] = make_images(images, p.conv.n, p.conv.outputs, p.conv.h, p.conv.w, p.conv.y);
  if (args[6] != Py_None) {
    check_forward_call(args[6]);
    Input r;
    read_input(outputs[2].get(), r, "conv_norm_forward: r");
    p.output.moments = Fields<F>(args[6])(F::training);
    if (!r.read_run(args[5], dlpack::kFloat32, r.channels(), p.bias) ||
        !read_running(Fields<F>(args[6]), r, p.output) ||
        !r.read_record(Fields<F>(args[6])[F::record], 9, p.output.record) ||
        (!p.output.moments && (!p.output.running_mean || !p.output.running_var || p.output.record)))
      refuse("conv_norm_forward: statistics", kNorm);
    read_numbers(Fields<F>(args[6]), p.output);
    p.output.shape = r.shape();
    Results results(r);
    p.output.mean = results.statistic(outputs[3]), p.output.spread = results.statistic(outputs[4]);
  }
  run_released(cpu_kernels().conv_norm_forward, p);
  return tuple_of(outputs);
}

// Makes a contiguous float64 tensor [2, C] for the sums of g and of g * xhat.
double* make_sums(const Input& x, Object& result) {
  const std::int64_t shape[] = {2, x.channels()}, strides[] = {x.channels(), 1};
  void* data;
  result = make(x.object(), x.tensor().device, dlpack::kFloat64, 2, shape, strides, data);
  return static_cast<double*>(data);
}

// Makes the gradients of a norm's parameters.
void make_parameter_gradients(const Input& x, Backward& p, Object& dweight, Object& dbias) {
  Results results(x);
  if (p.weight) p.dweight = {results.channels(dweight, p.weight.dtype), p.weight.dtype};
  if (p.bias) p.dbias = {results.channels(dbias, p.bias.dtype), p.bias.dtype};
}

// grad_before_act(call) -> (g, sums, dweight, dbias): the gradient before the activation, and the sums of it
PyObject* grad_before_act(PyObject* const* args) {
  check_backward_call(args[0]);
  const Fields<B> field(args[0]);
  Input x;
  read_input(field[B::x], x, "grad_before_act: x");
  Backward p{};
  if (!read_backward(field, x, p) || !p.mean || !p.invstd) refuse("grad_before_act: call", kNorm);
  Object outputs[4];
  p.sums = p.input = true;
  p.dresidual = Results(x).alike(outputs[0]);
  p.double_sums = make_sums(x, outputs[1]);
  make_parameter_gradients(x, p, outputs[2], outputs[3]);
  p.threads = threads();
  run_released(cpu_kernels().backward, p);
  return tuple_of(outputs);
}

// conv_norm_backward(output, sums, weight, input, y, shortcut, needs) -> (g, sums, dweight, dbias, dconv)
//   output    the BackwardCall of the norm behind the convolution, whose dy is the gradient g before its activation
//   sums      float64 [2, O]: the sums of g and of g * xhat
//   input     the BackwardCall of the norm before the convolution, without a dy, or None
//   y         the convolution's input, or None if `input` is to recompute it
//   shortcut  a gradient that is added to that of y, or None
//   needs     whether the first four results are needed, and dconv, the gradient of the convolution's weight. The first
//             is g of the input's norm, or without a norm the gradient of y; sums, dweight and dbias belong to it
PyObject* conv_norm_backward(PyObject* const* args) {
  ConvNormBackward p{};
  Object outputs[5];
  check_backward_call(args[0]);
  const Fields<B> behind(args[0]);
  Input r, x;
  read_input(behind[B::x], r, "conv_norm_backward: r");
  if (!read_backward(behind, r, p.output) || !p.output.mean || !p.output.invstd || p.output.act != Activation::none ||
      !r.read_run(args[1], dlpack::kFloat64, 2 * r.channels(), p.output_sums) || !p.output_sums)
    refuse("conv_norm_backward: output", kNorm);
  images_like(behind[B::dy], r, "conv_norm_backward: g");
  p.output.training = behind(B::training);
  p.conv = conv3x3_of(behind[B::x], args[2], true);
  const bool has_norm = args[3] != Py_None;
  if (has_norm) check_backward_call(args[3]);
  PyObject* const images = has_norm ? Fields<B>(args[3])[B::x] : args[4];
  read_input(images, x, "conv_norm_backward: x");
  const std::int64_t *const r_size = r.tensor().shape, *const x_size = x.tensor().shape;
  if (x_size[1] != p.conv.outputs || x_size[0] != r_size[0] || x_size[2] != r_size[2] || x_size[3] != r_size[3])
    refuse("conv_norm_backward: x", "of the size of the convolution's input");
  if (has_norm) {
    const Fields<B> before(args[3]);
    p.input.x = x.view(), p.input.shape = x.shape();
    if (!x.read_channels(before[B::weight], p.input.weight) || !x.read_channels(before[B::bias], p.input.bias) ||
        !x.read_statistic(before[B::mean], p.input.mean) || !x.read_statistic(before[B::invstd], p.input.invstd) ||
        !x.read_run(before[B::mask], dlpack::kUInt8, mask_bytes(x.shape()), p.input.mask) ||
        !x.read_record(before[B::record_affine], 8, p.input.record_affine) ||
        !x.read_record(before[B::record_samples], 5, p.input.record_samples) ||
        !read_activation(before[B::act], p.input.act) || !p.input.mean || !p.input.invstd)
      refuse("conv_norm_backward: input", kNorm);
  }
  p.y = images_like(args[4], x, "conv_norm_backward: y");
  p.shortcut = images_like(args[5], x, "conv_norm_backward: shortcut");
  PyObject* const needs = args[6];
  if (!PyTuple_Check(needs) || PyTuple_GET_SIZE(needs) != 2) refuse("conv_norm_backward: needs", "2 booleans");
  if (PyTuple_GET_ITEM(needs, 0) == Py_True) {
    outputs[0] = make_images(images, p.conv.n, p.conv.outputs, p.conv.h, p.conv.w, p.conv.y);
    if (has_norm) {
      p.input_sums = make_sums(x, outputs[1]);
      make_parameter_gradients(x, p.input, outputs[2], outputs[3]);
    }
  }
  if (PyTuple_GET_ITEM(needs, 1) == Py_True) {
    const std::int64_t shape[] = {p.conv.inputs, p.conv.outputs, 3, 3};
    const std::int64_t strides[] = {p.conv.outputs * 9, 9, 3, 1};
    void* data;
    outputs[4] = make(images, x.tensor().device, dlpack::kFloat32, 4, shape, strides, data);
    p.dweight = static_cast<float*>(data);
  }
  run_released(cpu_kernels().conv_norm_backward, p);
  return tuple_of(outputs);
}

}  // namespace

bool add_conv_norm(PyObject* module) {
  static PyMethodDef methods[] = {
      method<conv_norm_forward, 7>("conv_norm_forward",
                                   "conv_norm_forward(call, mean, invstd, keep, weight, bias, statistics) -> (y, mask, "
                                   "r, mean, invstd); see ConvNorm in csrc/cpu/cpu.h."),
      method<conv_norm_backward, 7>("conv_norm_backward",
                                    "conv_norm_backward(output, sums, weight, input, y, shortcut, needs) -> (g, sums, "
                                    "dweight, dbias, dconv); see ConvNormBackward in csrc/cpu/cpu.h."),
      method<grad_before_act, 1>("grad_before_act", "grad_before_act(call) -> (g, sums, dweight, dbias)."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
