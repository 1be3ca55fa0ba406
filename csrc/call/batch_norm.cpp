// Batch norm from a call of bnkern/backends/calls.py to the kernels, for every device.
//
// Each function reads the tensors of its call once, and checks at the same time whether the kernels support them. If
// not, it returns None before it writes or allocates anything. Then Python raises an error, calls the reference, or
// makes dense copies of the operands (bnkern/backends/native.py). Results are tensors of torch.
#include <algorithm>
#include <stdexcept>

#include "../cpu/cpu.h"
#include "calls.h"
#include "layout.h"
#include "tensors.h"

namespace bnkern {
namespace {

// The fields of a call by their names.
template <class Field>
class Fields {
 public:
  explicit Fields(PyObject* call) : call_(call) {}
  PyObject* operator[](Field field) const { return PyTuple_GET_ITEM(call_, static_cast<int>(field)); }
  bool operator()(Field field) const { return (*this)[field] == Py_True; }

 private:
  PyObject* call_;
};
#define BNKERN_NAME(name) name,
enum class F { BNKERN_FORWARD_FIELDS(BNKERN_NAME) };
enum class B { BNKERN_BACKWARD_FIELDS(BNKERN_NAME) };
#undef BNKERN_NAME

dlpack::DataType type_of(DType dtype) { return dlpack::kTypes[static_cast<int>(dtype)]; }

// ---------------------------------------------------------------------------------------------- operands

// The input of a call. The other operands are checked against it.
class Input {
 public:
  bool read_from(PyObject* object) {
    object_ = object;
    if (!read(object, tensor_) || tensor_.ndim < 2) return false;
    int code = 0;
    while (code < 4 && !(dlpack::kTypes[code] == tensor_.dtype)) ++code;
    dtype_ = static_cast<DType>(code);
    return code < 4 && readable(tensor_, layout_) && count() * channels() != 0 && on_supported_device();
  }

  const Tensor& tensor() const { return tensor_; }
  PyObject* object() const { return object_; }
  DType dtype() const { return dtype_; }
  DType accumulator() const { return dtype_ == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
  const Shape& shape() const { return layout_.shape; }
  std::int64_t channels() const { return layout_.shape.c; }
  std::int64_t count() const { return layout_.shape.n * layout_.shape.s; }
  bool on_cpu() const { return tensor_.device.type == dlpack::kCpu; }
  View view() const { return {tensor_.data, layout_.outer, layout_.inner}; }

  // Reads a tensor of the same sizes and dtype in the same layout, or None.
  bool read_alike(PyObject* object, View& view) const {
    view = {};
    if (object == Py_None) return true;
    Tensor t;
    Layout layout;
    if (!read(object, t) || t.ndim != tensor_.ndim || !(t.dtype == tensor_.dtype) || !(t.device == tensor_.device) ||
        !std::equal(t.shape, t.shape + t.ndim, tensor_.shape))
      return false;
    layout.shape = layout_.shape;
    if (!view_strides(t.ndim, t.shape, t.strides, shape().rows, layout.outer, layout.inner) || !reachable(layout))
      return false;
    view = {t.data, layout.outer, layout.inner};
    return true;
  }

  // Reads a contiguous vector with one value per channel, or None. Its dtype is that of the input, or float32 if the
  // input is bfloat16 or float16.
  bool read_channels(PyObject* object, ChannelVector& vector) const {
    vector = {};
    if (object == Py_None) return true;
    Tensor t;
    if (!read(object, t) || t.ndim != 1 || t.shape[0] != channels() || (channels() > 1 && t.strides[0] != 1) ||
        !(t.device == tensor_.device))
      return false;
    const bool same = t.dtype == tensor_.dtype;
    if (!same && !(t.dtype == dlpack::kFloat32 && dtype_ != DType::kFloat64)) return false;
    vector = {t.data, same ? dtype_ : DType::kFloat32};
    return true;
  }

  // Reads a contiguous tensor with this number of elements of this type, or None.
  template <class T>
  bool read_run(PyObject* object, dlpack::DataType type, std::int64_t elements, T*& data) const {
    data = nullptr;
    if (object == Py_None) return true;
    Tensor t;
    if (!read(object, t) || !(t.dtype == type) || !(t.device == tensor_.device)) return false;
    std::int64_t count = 1;
    for (int axis = 0; axis < t.ndim; ++axis) count *= t.shape[axis];
    if (count != elements || !one_run(t.shape, t.strides, t.ndim, [&](int k) { return t.ndim - 1 - k; })) return false;
    data = static_cast<T*>(t.data);
    return true;
  }
  template <class T>
  bool read_statistic(PyObject* object, T*& data) const {
    return read_run(object, type_of(accumulator()), channels(), data);
  }
  template <class T>
  bool read_weights(PyObject* object, T*& data) const {
    return read_run(object, type_of(accumulator()), count(), data) && (!data || on_cpu());
  }
  bool read_record(PyObject* object, int rows, double*& data) const {
    return read_run(object, dlpack::kFloat64, rows * channels(), data);
  }

 private:
  bool on_supported_device() const { return on_cpu() || tensor_.device.type == dlpack::kCuda; }
  bool readable(const Tensor& t, Layout& layout) const {
    return view_layout(t.ndim, t.shape, t.strides, layout) && reachable(layout);
  }
  // The CPU kernels support rows without gaps, and rows whose number of channels is a multiple of 16.
  bool reachable(const Layout& layout) const {
    const Shape& shape = layout.shape;
    return !on_cpu() || !shape.rows || shape.c % 16 == 0 || layout.outer == shape.c;
  }

  PyObject* object_;
  Tensor tensor_;
  DType dtype_;
  Layout layout_;
};

// ---------------------------------------------------------------------------------------------- results

class Results {
 public:
  explicit Results(const Input& x) : x_(x) {}

  // Makes a tensor of the input's sizes and dtype in its memory format.
  View alike(Object& result) {
    const Tensor& t = x_.tensor();
    View view{nullptr, x_.view().outer, x_.view().inner};
    if (keeps_strides(t.ndim, t.shape, t.strides, x_.shape().rows)) {
      result = make(x_.object(), t.device, t.dtype, t.ndim, t.shape, t.strides, view.data);
      return view;
    }
    if (!strides_) find_strides();
    view_strides(t.ndim, t.shape, strides_.get(), x_.shape().rows, view.outer, view.inner);
    result = make(x_.object(), t.device, t.dtype, t.ndim, t.shape, strides_.get(), view.data);
    return view;
  }
  void* channels(Object& result, DType dtype) {
    const std::int64_t size = x_.channels();
    return run(result, type_of(dtype), size);
  }
  void* statistic(Object& result) { return channels(result, x_.accumulator()); }
  // Makes a mask, whose shape is Layout.mask_shape of layout.py.
  std::uint8_t* mask(Object& result) {
    const Shape& shape = x_.shape();
    if (shape.rows)
      return static_cast<std::uint8_t*>(run(result, dlpack::kUInt8, (shape.n * shape.c * shape.s + 7) / 8));
    const std::int64_t bytes = (shape.s + 7) / 8;
    const std::int64_t sizes[] = {shape.n, shape.c, bytes}, strides[] = {shape.c * bytes, bytes, 1};
    void* data;
    result = make(x_.object(), x_.tensor().device, dlpack::kUInt8, 3, sizes, strides, data);
    return static_cast<std::uint8_t*>(data);
  }

 private:
  void* run(Object& result, dlpack::DataType type, std::int64_t size) {
    const std::int64_t step = 1;
    void* data;
    result = make(x_.object(), x_.tensor().device, type, 1, &size, &step, data);
    return data;
  }
  void find_strides() {
    const Object strides = output_strides(x_.tensor());
    const int ndim = x_.tensor().ndim;
    strides_ = std::make_unique<std::int64_t[]>(ndim);
    for (int axis = 0; axis < ndim; ++axis) strides_[axis] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides.get(), axis));
  }

  const Input& x_;
  std::unique_ptr<std::int64_t[]> strides_;
};

std::int64_t mask_bytes(const Shape& shape) {
  return shape.rows ? (shape.n * shape.c * shape.s + 7) / 8 : shape.n * shape.c * ((shape.s + 7) / 8);
}

// ---------------------------------------------------------------------------------------------- launches

void launch(const Input& x, Forward& p) {
  if (!x.on_cpu()) return launch_cuda(p, x.object(), x.tensor().device);
  p.threads = threads();
  run_released(cpu_kernels().forward, p);
}
void launch(const Input& x, Backward& p) {
  if (!x.on_cpu()) return launch_cuda(p, x.object(), x.tensor().device);
  p.threads = threads();
  run_released(cpu_kernels().backward, p);
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  return value;
}

// Reads the activation that a field names. None means no activation. Returns false if there is no such activation.
bool read_activation(PyObject* act, Activation& result) {
  result = Activation::none;
  if (act == Py_None) return true;
  if (!PyUnicode_Check(act)) return false;
#define BNKERN_NAMED(name) \
  if (PyUnicode_CompareWithASCIIString(act, #name) == 0) result = Activation::name;
  BNKERN_ACTIVATIONS(BNKERN_NAMED)
#undef BNKERN_NAMED
  return result != Activation::none;
}

// ---------------------------------------------------------------------------------------------- the forward

// Whether a call that was not validated is certainly valid by the rules of check_call in validation.py. If this returns
// false, the call may be valid or not.
bool certainly_valid(PyObject* call, const Fields<F>& field, const Input& x) {
  PyObject *const momentum = field[F::momentum], *const eps = field[F::eps];
  const bool training = field(F::training), tracked = field[F::running_mean] != Py_None;
  if (!PyBool_Check(field[F::training]) || !PyFloat_CheckExact(eps)) return false;
  const double eps_value = PyFloat_AS_DOUBLE(eps);
  if (!(eps_value > 0 || (eps_value == 0 && !training))) return false;
  if (!PyFloat_CheckExact(momentum) &&
      !(momentum == Py_None && (!training || !tracked || field[F::num_batches_tracked] != Py_None)))
    return false;
  if (tracked != (field[F::running_var] != Py_None) || !(tracked || training)) return false;
  if (training && x.count() == 1) return false;
  if (field[F::sample_weight] != Py_None) return false;
  return std::none_of(&PyTuple_GET_ITEM(call, 0), &PyTuple_GET_ITEM(call, 0) + 7, negated) &&
         !negated(field[F::num_batches_skipped]);
}

// Reads the operands that forward and normalize share. Returns false if one is not supported.
bool read_forward(const Fields<F>& field, Input& x, Forward& p) {
  if (!x.read_from(field[F::x]) || !x.read_channels(field[F::weight], p.weight) ||
      !x.read_channels(field[F::bias], p.bias) || !x.read_alike(field[F::residual], p.residual) ||
      !x.read_record(field[F::record], 9, p.record) || !read_activation(field[F::act], p.act))
    return false;
  p.shape = x.shape(), p.dtype = x.dtype(), p.x = x.view();
  return true;
}

bool has_mask(const Fields<F>& field, const Forward& p) {
  return field(F::save_mask) && p.act != Activation::none && p.residual;
}

// forward(call, validated) -> (y, mean, invstd, mask), or None. Other calls must be certainly_valid().
PyObject* forward(PyObject* const* args) {
  check_forward_call(args[0]);
  const Fields<F> field(args[0]);
  Input x;
  Forward p{};
  if (!read_forward(field, x, p) || !x.read_channels(field[F::running_mean], p.running_mean) ||
      !x.read_channels(field[F::running_var], p.running_var) ||
      !x.read_run(field[F::num_batches_tracked], dlpack::kInt64, 1, p.counter) ||
      !x.read_run(field[F::num_batches_skipped], dlpack::kInt64, 1, p.skipped) || (p.skipped && !x.on_cpu()) ||
      !x.read_weights(field[F::sample_weight], p.sample_weight) || (p.sample_weight && p.record) ||
      (args[1] != Py_True && !certainly_valid(args[0], field, x)))
    Py_RETURN_NONE;
  p.moments = field(F::training), p.normalize = true;
  p.cumulative = field[F::momentum] == Py_None;
  p.momentum = p.cumulative ? 0.0 : number(field[F::momentum]);
  p.eps = number(field[F::eps]);
  Object outputs[4];
  Results results(x);
  p.y = results.alike(outputs[0]);
  if (p.moments || p.running_mean) p.mean = results.statistic(outputs[1]), p.spread = results.statistic(outputs[2]);
  if (has_mask(field, p)) p.mask = results.mask(outputs[3]);
  launch(x, p);
  return tuple_of(outputs);
}

// moments(x) -> (mean, M2), or None
PyObject* moments(PyObject* const* args) {
  Input x;
  if (!x.read_from(args[0])) Py_RETURN_NONE;
  Forward p{};
  p.shape = x.shape(), p.dtype = x.dtype(), p.x = x.view(), p.moments = true;
  Object outputs[2];
  Results results(x);
  p.mean = results.statistic(outputs[0]), p.spread = results.statistic(outputs[1]);
  launch(x, p);
  return tuple_of(outputs);
}

// normalize(call, mean, invstd) -> (y, mask), or None
PyObject* normalize(PyObject* const* args) {
  check_forward_call(args[0]);
  const Fields<F> field(args[0]);
  Input x;
  Forward p{};
  if (!read_forward(field, x, p) || !x.read_statistic(args[1], p.mean) || !x.read_statistic(args[2], p.spread))
    Py_RETURN_NONE;
  p.normalize = true;
  Object outputs[2];
  Results results(x);
  p.y = results.alike(outputs[0]);
  if (has_mask(field, p)) p.mask = results.mask(outputs[1]);
  launch(x, p);
  return tuple_of(outputs);
}

// ---------------------------------------------------------------------------------------------- the backward

struct Needs {
  bool x, weight, bias, residual;
};
Needs needs_of(PyObject* needs) {
  if (!PyTuple_Check(needs) || PyTuple_GET_SIZE(needs) != 4) {
    PyErr_SetString(PyExc_TypeError, "needs must be a tuple of 4 booleans");
    throw PythonError();
  }
  const auto need = [&](int i) { return PyTuple_GET_ITEM(needs, i) == Py_True; };
  return {need(0), need(1), need(2), need(3)};
}

// Reads the operands that all functions of the backward share. Returns false if one is not supported.
bool read_backward(const Fields<B>& field, Input& x, Backward& p) {
  if (!x.read_from(field[B::x]) || field[B::dy] == Py_None || !x.read_alike(field[B::dy], p.dy) ||
      !x.read_channels(field[B::weight], p.weight) || !x.read_channels(field[B::bias], p.bias) ||
      !x.read_statistic(field[B::mean], p.mean) || !x.read_statistic(field[B::invstd], p.invstd) ||
      !x.read_run(field[B::mask], dlpack::kUInt8, mask_bytes(x.shape()), p.mask) ||
      !x.read_record(field[B::record_gradient], 8, p.record_gradient) ||
      !x.read_record(field[B::record_affine], 8, p.record_affine) ||
      !x.read_record(field[B::record_samples], 5, p.record_samples) || (p.record_samples && !x.on_cpu()) ||
      !x.read_weights(field[B::sample_weight], p.sample_weight) ||
      (p.sample_weight && (p.record_gradient || p.record_affine || p.record_samples)) ||
      !read_activation(field[B::act], p.act))
    return false;
  p.shape = x.shape(), p.dtype = x.dtype(), p.x = x.view();
  if (!p.mean) p.record_affine = p.record_samples = nullptr;  // the identity has no affine parameters
  return true;
}

// backward(call) -> (dx, dweight, dbias, dresidual), or None
PyObject* backward(PyObject* const* args) {
  check_backward_call(args[0]);
  const Fields<B> field(args[0]);
  Input x;
  Backward p{};
  const Needs need = needs_of(field[B::needs]);
  if (!read_backward(field, x, p)) Py_RETURN_NONE;
  if (!need.x) p.record_gradient = nullptr;
  Object outputs[4];
  Results results(x);
  if (need.x) p.dx = results.alike(outputs[0]);
  if (need.weight) p.dweight = {results.channels(outputs[1], p.weight.dtype), p.weight.dtype};
  if (need.bias) p.dbias = {results.channels(outputs[2], p.bias.dtype), p.bias.dtype};
  if (need.residual) p.dresidual = results.alike(outputs[3]);
  // Only dx needs the batch statistics' terms. If dx is not requested, skip them and the sums that they need.
  p.training = field(B::training) && need.x;
  p.sums = need.weight || need.bias || p.training || p.record_affine || p.record_samples;
  p.input = need.x || need.residual;
  if (p.sums || p.input) launch(x, p);
  return tuple_of(outputs);
}

// grad_sums(call) -> (sum g, sum g * xhat), or None
PyObject* grad_sums(PyObject* const* args) {
  check_backward_call(args[0]);
  Input x;
  Backward p{};
  if (!read_backward(Fields<B>(args[0]), x, p)) Py_RETURN_NONE;
  p.record_gradient = nullptr;
  p.sums = p.training = true;
  Object outputs[2];
  Results results(x);
  p.sum_dy = results.statistic(outputs[0]), p.sum_dy_xhat = results.statistic(outputs[1]);
  launch(x, p);
  return tuple_of(outputs);
}

// grad_input(call, sum g, sum g * xhat) -> (dx, dresidual), or None. The sums are None in eval mode.
PyObject* grad_input(PyObject* const* args) {
  check_backward_call(args[0]);
  const Fields<B> field(args[0]);
  Input x;
  Backward p{};
  const Needs need = needs_of(field[B::needs]);
  if (!read_backward(field, x, p) || !x.read_statistic(args[1], p.sum_dy) || !x.read_statistic(args[2], p.sum_dy_xhat))
    Py_RETURN_NONE;
  p.record_affine = p.record_samples = nullptr;
  if (!need.x) p.record_gradient = nullptr;
  p.input = true, p.training = p.sum_dy;
  Object outputs[2];
  Results results(x);
  if (need.x) p.dx = results.alike(outputs[0]);
  if (need.residual) p.dresidual = results.alike(outputs[1]);
  if (need.x || need.residual) launch(x, p);
  return tuple_of(outputs);
}

// ---------------------------------------------------------------------------------------------- the definitions

Object names_of(std::initializer_list<const char*> names) {
  Object tuple = checked(PyTuple_New(static_cast<Py_ssize_t>(names.size())));
  Py_ssize_t i = 0;
  for (const char* name : names) PyTuple_SET_ITEM(tuple.get(), i++, checked(PyUnicode_FromString(name)).release());
  return tuple;
}

// fields() -> the names of the fields of ForwardCall and BackwardCall and of the activations, as C++ defines them.
// bnkern/backends/native.py compares them with its own.
PyObject* fields(PyObject* const*) {
#define BNKERN_NAME(name) #name,
  Object lists[] = {names_of({BNKERN_FORWARD_FIELDS(BNKERN_NAME)}), names_of({BNKERN_BACKWARD_FIELDS(BNKERN_NAME)}),
                    names_of({BNKERN_ACTIVATIONS(BNKERN_NAME)})};
#undef BNKERN_NAME
  return tuple_of(lists);
}

}  // namespace

bool add_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      method<connect, 1>("connect", "connect(module): what C++ needs of torch; whether the exchange table is used."),
      method<fields, 0>("fields", "The names of ForwardCall's fields, BackwardCall's and the activations in C++."),
      method<forward, 2>("forward", "forward(call, validated) -> (y, mean, invstd, mask), or None."),
      method<moments, 1>("moments", "moments(x) -> (mean, M2), or None."),
      method<normalize, 3>("normalize", "normalize(call, mean, invstd) -> (y, mask), or None."),
      method<backward, 1>("backward", "backward(call) -> (dx, dweight, dbias, dresidual), or None."),
      method<grad_sums, 1>("grad_sums", "grad_sums(call) -> (sum g, sum g * xhat), or None."),
      method<grad_input, 3>("grad_input", "grad_input(call, sum g, sum g * xhat) -> (dx, dresidual), or None."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
