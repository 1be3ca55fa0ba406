// The operands and results of the functions that take a call of bnkern/backends/calls.py.
#pragma once

#include <algorithm>
#include <memory>

#include "../params.h"
#include "layout.h"
#include "tensors.h"

namespace bnkern {

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

inline dlpack::DataType type_of(DType dtype) { return dlpack::kTypes[static_cast<int>(dtype)]; }

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

inline std::int64_t mask_bytes(const Shape& shape) {
  return shape.rows ? (shape.n * shape.c * shape.s + 7) / 8 : shape.n * shape.c * ((shape.s + 7) / 8);
}

inline double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1.0 && PyErr_Occurred()) throw PythonError();
  return value;
}

// Reads the activation that a field names. None means no activation. Returns false if there is no such activation.
inline bool read_activation(PyObject* act, Activation& result) {
  result = Activation::none;
  if (act == Py_None) return true;
  if (!PyUnicode_Check(act)) return false;
#define BNKERN_NAMED(name) \
  if (PyUnicode_CompareWithASCIIString(act, #name) == 0) result = Activation::name;
  BNKERN_ACTIVATIONS(BNKERN_NAMED)
#undef BNKERN_NAMED
  return result != Activation::none;
}

// ---------------------------------------------------------------------------------------------- calls

// Reads the operands that forward and normalize share. Returns false if one is not supported.
inline bool read_forward(const Fields<F>& field, Input& x, Forward& p) {
  if (!x.read_from(field[F::x]) || !x.read_channels(field[F::weight], p.weight) ||
      !x.read_channels(field[F::bias], p.bias) || !x.read_alike(field[F::residual], p.residual) ||
      !x.read_record(field[F::record], 9, p.record) || !read_activation(field[F::act], p.act))
    return false;
  p.shape = x.shape(), p.dtype = x.dtype(), p.x = x.view();
  return true;
}

// Reads the running statistics of a norm and its counters. x has the norm's channels.
inline bool read_running(const Fields<F>& field, const Input& x, Forward& p) {
  return x.read_channels(field[F::running_mean], p.running_mean) &&
         x.read_channels(field[F::running_var], p.running_var) &&
         x.read_run(field[F::num_batches_tracked], dlpack::kInt64, 1, p.counter) &&
         x.read_run(field[F::num_batches_skipped], dlpack::kInt64, 1, p.skipped) && (!p.skipped || x.on_cpu());
}

// Reads the numbers of a valid call.
inline void read_numbers(const Fields<F>& field, Forward& p) {
  p.cumulative = field[F::momentum] == Py_None;
  p.momentum = p.cumulative ? 0.0 : number(field[F::momentum]);
  p.eps = number(field[F::eps]);
}

inline bool has_mask(const Fields<F>& field, const Forward& p) {
  return field(F::save_mask) && p.act != Activation::none && p.residual;
}

// Reads the operands that all functions of the backward share. Returns false if one is not supported.
inline bool read_backward(const Fields<B>& field, Input& x, Backward& p) {
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

}  // namespace bnkern
