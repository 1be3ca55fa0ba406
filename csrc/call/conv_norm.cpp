// Calls of the convolution between two batch norms with torch's tensors (csrc/cpu/conv_norm.h, CudaConvNorm in
// csrc/cuda/kernels.h). Its backward has kernels on the CPU only.
#include "../cuda/kernels.h"
#include "calls.h"
#include "images.h"
#include "operands.h"

namespace bnkern {
namespace {

constexpr const char* kNorm = "a call for float32 tensors [N, C, H, W] on the CPU, dense in channels_last";
constexpr const char* kCudaNorm =
    "a call for bfloat16 or float16 tensors [N, C, H, W] on a CUDA device, dense in channels_last, that begin at "
    "multiples of 16 bytes, without a record and num_batches_skipped";

// Reads the tensor that a batch norm normalises, on the CPU.
void read_input(PyObject* object, Input& x, const char* name) {
  if (!x.read_from(object) || !x.on_cpu() || x.dtype() != DType::kFloat32 || !is_channels_last(x.tensor()))
    refuse(name, kNorm);
}

// Reads images of the sizes of x, or None.
void* images_like(PyObject* object, const Input& x, const char* name, const char* expected) {
  View view;
  if (!x.read_alike(object, view) || (view && view.outer != x.channels())) refuse(name, expected);
  if (!x.on_cpu() && reinterpret_cast<std::uintptr_t>(view.data) % 16 != 0) refuse(name, expected);
  return view.data;
}
float* images_like(PyObject* object, const Input& x, const char* name) {
  return static_cast<float*>(images_like(object, x, name, kNorm));
}

// The source of conv_norm_forward: the ForwardCall of the norm before the convolution, or the convolution's input.
class Source {
 public:
  explicit Source(PyObject* source) : source_(source), normalizes_(PyTuple_Check(source)) {
    if (normalizes_) check_forward_call(source);
    constexpr const char* kName = "conv_norm_forward: x";
    if (!x_.read_from(images())) refuse(kName, "a tensor that is not empty, on the CPU or a CUDA device");
    const bool half = x_.dtype() == DType::kBFloat16 || x_.dtype() == DType::kFloat16;
    if (x_.on_cpu() ? x_.dtype() != DType::kFloat32 : !half) refuse(kName, expected());
    if (!is_channels_last(x_.tensor())) refuse(kName, expected());
    images_like(images(), x_, kName, expected());
  }
  const Input& x() const { return x_; }
  PyObject* images() const { return normalizes_ ? Fields<F>(source_)[F::x] : source_; }
  const char* expected() const { return x_.on_cpu() ? kNorm : kCudaNorm; }

  // Reads the call of normalize with its statistics, and makes y, if it is to be kept, and its mask.
  void read_norm(PyObject* mean, PyObject* invstd, bool keep, Forward& p, Object& y, Object& mask) {
    p.x = x_.view(), p.shape = x_.shape(), p.dtype = x_.dtype();
    if (!normalizes_) return;
    const Fields<F> field(source_);
    if (!read_forward(field, x_, p) || (p.record && !x_.on_cpu()) || !x_.read_statistic(mean, p.mean) ||
        !x_.read_statistic(invstd, p.spread) || !p.mean || !p.spread)
      refuse("conv_norm_forward: call", expected());
    images_like(field[F::residual], x_, "conv_norm_forward: residual", expected());
    if (keep) {
      const std::int64_t* const size = x_.tensor().shape;
      p.y = {nullptr, x_.channels(), 1};
      y = make_images(images(), x_.tensor(), size[0], size[1], size[2], size[3], p.y.data);
    }
    if (has_mask(field, p)) p.mask = Results(x_).mask(mask);
  }

 private:
  PyObject* source_;
  bool normalizes_;
  Input x_;
};

// Reads the call of the norm behind the convolution, whose output is r, and makes its statistics.
void read_norm_behind(PyObject* call, PyObject* r, const char* expected, Forward& p, Object& mean, Object& invstd) {
  check_forward_call(call);
  const Fields<F> field(call);
  Input x;
  if (!x.read_from(r) || !read_running(field, x, p) || !x.read_record(field[F::record], 9, p.record) ||
      (p.record && !x.on_cpu()))
    refuse("conv_norm_forward: statistics", expected);
  p.moments = field(F::training);
  if (!p.moments && (!x.on_cpu() || !p.running_mean || !p.running_var || p.record))
    refuse("conv_norm_forward: statistics", "in training, or on the CPU with running statistics and without a record");
  read_numbers(field, p);
  p.shape = x.shape(), p.dtype = x.dtype(), p.x = x.view();
  Results results(x);
  p.mean = results.statistic(mean), p.spread = results.statistic(invstd);
}

// conv_norm_forward(call, mean, invstd, keep, weight, bias, statistics) -> (y, mask, r, mean, invstd)
//   call        the ForwardCall of the norm before the convolution, or its input y itself
//   keep        whether y is returned
//   bias        of the convolution, only on the CPU, or None
//   statistics  the ForwardCall of the norm behind it, without an x, or None on the CPU. On the CPU it may be in eval
//               mode, and mean and invstd are then those of the running statistics
PyObject* conv_norm_forward(PyObject* const* args) {
  Source source(args[0]);
  const Input& x = source.x();
  Forward input{}, output{};
  Object outputs[5];
  const Weight3x3 weight = weight3x3_of(args[4], x.tensor(), false, "conv_norm_forward: weight",
                                        "a tensor [O, I, 3, 3] that fits x, of its dtype and device");
  if (!x.on_cpu() && weight.inputs != weight.outputs)
    refuse("conv_norm_forward: weight", "of as many outputs as inputs on a CUDA device");
  const float* bias = nullptr;
  const dlpack::Device& device = x.tensor().device;
  if (args[5] != Py_None) {
    constexpr const char* kBias = "None or a contiguous float32 tensor [O] on the CPU";
    const Tensor t = operand(args[5], "conv_norm_forward: bias", kBias, dlpack::kFloat32, 1);
    if (!x.on_cpu() || t.shape[0] != weight.outputs || t.strides[0] != 1) refuse("conv_norm_forward: bias", kBias);
    bias = static_cast<const float*>(t.data);
  }
  source.read_norm(args[1], args[2], args[3] == Py_True, input, outputs[0], outputs[1]);
  const std::int64_t* const size = x.tensor().shape;
  void* r;
  outputs[2] = make_images(source.images(), x.tensor(), size[0], weight.outputs, size[2], size[3], r);
  if (args[6] != Py_None || !x.on_cpu())
    read_norm_behind(args[6], outputs[2].get(), source.expected(), output, outputs[3], outputs[4]);
  if (x.on_cpu()) {
    if (!input.mean) input = Forward{};  // the kernel recognises by this that x is the convolution's input
    ConvNorm p{input, conv3x3_of(source.images(), args[4], false), bias, output};
    p.conv.y = static_cast<float*>(r);
    run_released(cpu_kernels().conv_norm_forward, p);
  } else {
    output.normalize = true;  // so that the kernel stores invstd
    CudaConvNorm p{input,   output, weight.data, weight.output, weight.input, weight.h, weight.w, size[2],
                   size[3], {},     {}};
    launch_cuda(p, source.images(), device);
  }
  return tuple_of(outputs);
}

// conv_norm_refusal(x) -> why the CUDA kernel does not serve convolutions between the channels of x, or None
PyObject* conv_norm_refusal(PyObject* const* args) {
  const Source source(args[0]);
  const Input& x = source.x();
  if (x.on_cpu()) refuse("conv_norm_refusal: x", kCudaNorm);
  CudaConvNorm p{};
  p.output.shape = x.shape(), p.output.dtype = x.dtype();
  p.h = x.tensor().shape[2], p.w = x.tensor().shape[3];
  const std::string reason = cuda_refusal(p, x.tensor().device);
  if (reason.empty()) Py_RETURN_NONE;
  return checked(PyUnicode_FromString(reason.c_str())).release();
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
                                   "r, mean, invstd); see ConvNorm in csrc/cpu/cpu.h and CudaConvNorm in "
                                   "csrc/cuda/kernels.h."),
      method<conv_norm_refusal, 1>("conv_norm_refusal",
                                   "conv_norm_refusal(x): why CUDA's conv_norm_forward does not serve such images."),
      method<conv_norm_backward, 7>("conv_norm_backward",
                                    "conv_norm_backward(output, sums, weight, input, y, shortcut, needs) -> (g, sums, "
                                    "dweight, dbias, dconv); see ConvNormBackward in csrc/cpu/cpu.h."),
      method<grad_before_act, 1>("grad_before_act", "grad_before_act(call) -> (g, sums, dweight, dbias)."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
