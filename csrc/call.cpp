// Batch norm's two calls on the CPU as Python's C functions, for the tensors of nearly every step: plain and dense.
// What they need to know of a tensor they read through DLPack's exchange table, which takes some tens of nanoseconds
// where attributes read in Python take microseconds. Anything unusual is declined by returning None, before anything is
// written: the launchers of bnkern/backends/cpu.py then do the same work, or say what is wrong.
#include "call.h"

#include <Python.h>

#include <algorithm>
#include <exception>
#include <new>
#include <utility>

#include "cpu/cpu.h"
#include "dlpack.h"
#include "layout.h"

namespace bnkern {
namespace {

using dlpack::Tensor;

// Given once, by `exchange`, before the first call.
const dlpack::ExchangeApi* api = nullptr;
PyObject* plain_types = nullptr;  // a tuple: the types whose instances are tensors and nothing else
PyObject* is_neg = nullptr;       // torch.Tensor.is_neg

// An owned reference, or none.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* object) : object_(object) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* const object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_ = nullptr;
};

struct PythonError {};  // thrown where a Python error is set already

// Other Python threads run while a kernel does.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  Released(const Released&) = delete;
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* const state_;
};

bool read(PyObject* object, Tensor& tensor) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (Py_ssize_t i = 0; PyTuple_GET_ITEM(plain_types, i) != type;)
    if (++i == PyTuple_GET_SIZE(plain_types)) return false;
  if (api->view_of_object(object, &tensor) == 0) return tensor.data;  // null where empty, or zeros never stored
  PyErr_Clear();  // sparse, meta, of a transform: whoever is asked next says so
  return false;
}

// DLPack does not tell of lazy negation (torch.Tensor.is_neg), under which the elements in memory are not the values.
bool negated(PyObject* tensor) {
  if (tensor == Py_None) return false;
  const Object answer(PyObject_Vectorcall(is_neg, &tensor, 1, nullptr));
  if (!answer.get()) PyErr_Clear();
  return answer.get() != Py_False;
}

void* data_of(const Tensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// The code of dtype.h, or -1.
int code_of(const dlpack::DataType& type) {
  for (int code = 0; code < 4; ++code)
    if (dlpack::kTypes[code] == type) return code;
  return -1;
}

// A contiguous tensor of that many elements and of one axis, unless `any_shape`.
bool is_run(const Tensor& t, std::int64_t elements, bool any_shape = false) {
  if (any_shape) {
    std::int64_t count = 1;
    for (int axis = 0; axis < t.ndim; ++axis) count *= t.shape[axis];
    return count == elements && one_run(t.shape, t.strides, t.ndim, [&](int k) { return t.ndim - 1 - k; });
  }
  return t.ndim == 1 && t.shape[0] == elements && (elements <= 1 || t.strides[0] == 1);
}

// The input, and what a kernel must know of it.
struct Input {
  Tensor tensor;
  int dtype;
  std::int64_t channels;
};

bool read_input(PyObject* object, Input& x) {
  if (!read(object, x.tensor) || x.tensor.ndim < 2) return false;
  x.dtype = code_of(x.tensor.dtype);
  x.channels = x.tensor.shape[1];
  return x.dtype >= 0;
}

// A tensor that lies in memory as the input does, or None.
bool read_alike(PyObject* object, const Input& x, void*& data) {
  data = nullptr;
  if (object == Py_None) return true;
  Tensor t;
  if (!read(object, t) || t.ndim != x.tensor.ndim || !(t.dtype == x.tensor.dtype) || !(t.device == x.tensor.device))
    return false;
  for (int axis = 0; axis < t.ndim; ++axis)
    if (t.shape[axis] != x.tensor.shape[axis] || (t.strides[axis] != x.tensor.strides[axis] && t.shape[axis] != 1))
      return false;
  data = data_of(t);
  return true;
}

// A contiguous vector of the input's dtype, or of float32 where that is bfloat16 or float16, or None.
bool read_channels(PyObject* object, const Input& x, ChannelVector& vector) {
  vector = {};
  if (object == Py_None) return true;
  Tensor t;
  if (!read(object, t) || !is_run(t, x.channels) || !(t.device == x.tensor.device)) return false;
  const int dtype = code_of(t.dtype), float32 = static_cast<int>(DType::kFloat32);
  if (dtype != x.dtype && (dtype != float32 || x.dtype == static_cast<int>(DType::kFloat64))) return false;
  vector = {data_of(t), static_cast<DType>(dtype)};
  return true;
}

// A contiguous tensor of that many elements of that type, or None.
bool read_run(PyObject* object, const Input& x, dlpack::DataType type, std::int64_t elements, void*& data) {
  data = nullptr;
  if (object == Py_None) return true;
  Tensor t;
  if (!read(object, t) || !(t.dtype == type) || !(t.device == x.tensor.device) || !is_run(t, elements, true))
    return false;
  data = data_of(t);
  return true;
}

// The tensors that batch_norm is called with, in the order of the launchers' arguments.
struct Tensors {
  Input x;
  ChannelVector weight, bias, running_mean, running_var;
  void *residual, *counter;

  bool read(PyObject* const* args) {
    return read_input(args[0], x) && read_channels(args[1], x, weight) && read_channels(args[2], x, bias) &&
           read_alike(args[3], x, residual) && read_channels(args[4], x, running_mean) &&
           read_channels(args[5], x, running_var) && read_run(args[6], x, dlpack::kInt64, 1, counter);
  }
};

// A new tensor, and where its elements lie.
Object make(dlpack::DataType type, int ndim, const std::int64_t* shape, const std::int64_t* strides, void*& data) {
  dlpack::Managed* const managed = dlpack::empty(type, ndim, shape, strides);
  data = managed->tensor.data;
  void* object;
  if (api->object_from_managed(managed, &object) != 0) throw PythonError();
  return Object(static_cast<PyObject*>(object));
}

Object make_alike(const Input& x, void*& data) {
  return make(x.tensor.dtype, x.tensor.ndim, x.tensor.shape, x.tensor.strides, data);
}

Object make_channels(dlpack::DataType type, const Input& x, void*& data) {
  const std::int64_t step = 1;
  return make(type, 1, &x.channels, &step, data);
}

// Layout.mask_shape of layout.py.
Object make_mask(const Shape& shape, void*& data) {
  if (shape.rows) {
    const std::int64_t bytes = (shape.n * shape.c * shape.s + 7) / 8, step = 1;
    return make(dlpack::kUInt8, 1, &bytes, &step, data);
  }
  const std::int64_t bytes = (shape.s + 7) / 8;
  const std::int64_t sizes[] = {shape.n, shape.c, bytes}, strides[] = {shape.c * bytes, bytes, 1};
  return make(dlpack::kUInt8, 3, sizes, strides, data);
}

std::int64_t mask_bytes(const Shape& shape) {
  return shape.rows ? (shape.n * shape.c * shape.s + 7) / 8 : shape.n * shape.c * ((shape.s + 7) / 8);
}

dlpack::DataType accumulator(const Input& x) {
  return dlpack::kTypes[static_cast<int>(x.dtype == static_cast<int>(DType::kFloat64) ? DType::kFloat64
                                                                                      : DType::kFloat32)];
}

bool dense_on_cpu(const Input& x, Layout& layout) {
  return x.tensor.device.type == dlpack::kCpu && dense_layout(x.tensor.ndim, x.tensor.shape, x.tensor.strides, layout);
}

template <std::size_t size>
PyObject* tuple_of(Object (&objects)[size]) {
  PyObject* const tuple = PyTuple_New(size);
  if (!tuple) throw PythonError();
  for (std::size_t i = 0; i < size; ++i) {
    PyObject* const object = objects[i].release();
    PyTuple_SET_ITEM(tuple, i, object ? object : Py_NewRef(Py_None));
  }
  return tuple;
}

// A C function of `count` arguments, errors turned into Python's.
template <PyObject* (*body)(PyObject* const*), Py_ssize_t count>
PyObject* called(PyObject*, PyObject* const* args, Py_ssize_t given) {
  if (given != count) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, given);
  try {
    return body(args);
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

// exchange(capsule, plain_types, is_neg) -> whether the table is one that can be used.
PyObject* exchange(PyObject* const* args) {
  constexpr const char* kName = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(args[0], kName) || !PyTuple_Check(args[1])) Py_RETURN_FALSE;
  const auto* const table = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(args[0], kName));
  if (table->version.major != dlpack::kVersion.major || !table->view_of_object) Py_RETURN_FALSE;
  api = table;
  plain_types = Py_NewRef(args[1]);
  is_neg = Py_NewRef(args[2]);
  Py_RETURN_TRUE;
}

// usual(x, weight, bias, residual, running_mean, running_var, counter, training, momentum, eps, act): the function
// `_usual` of bnkern/functional.py, in the same words.
PyObject* usual(PyObject* const* args) {
  PyObject *const training = args[7], *const momentum = args[8], *const eps = args[9], *const act = args[10];
  const bool options =
      PyBool_Check(training) && PyFloat_CheckExact(momentum) && PyFloat_CheckExact(eps) &&
      (PyFloat_AS_DOUBLE(eps) > 0 || (PyFloat_AS_DOUBLE(eps) == 0 && training == Py_False)) &&
      (act == Py_None || (PyUnicode_CheckExact(act) && PyUnicode_CompareWithASCIIString(act, "relu") == 0));
  const bool none = args[4] == Py_None;
  if (!options || none != (args[5] == Py_None) || (none && training == Py_False)) Py_RETURN_FALSE;
  Tensors t;
  if (!t.read(args) || std::any_of(args, args + 7, negated)) Py_RETURN_FALSE;
  std::int64_t per_channel = t.x.tensor.shape[0];
  for (int axis = 2; axis < t.x.tensor.ndim; ++axis) per_channel *= t.x.tensor.shape[axis];
  return PyBool_FromLong(training == Py_False || (per_channel != 1 && t.x.channels != 0));
}

// forward(x, weight, bias, residual, running_mean, running_var, counter, training, momentum, eps, act, save_mask,
// record, threads): `forward` of cpu.py; (y, mean, invstd, mask), or None.
PyObject* forward(PyObject* const* args) {
  Tensors t;
  Layout layout;
  void* record;
  if (!t.read(args) || !dense_on_cpu(t.x, layout) ||
      !read_run(args[12], t.x, dlpack::kFloat64, 8 * t.x.channels, record))
    Py_RETURN_NONE;
  const bool training = args[7] == Py_True, relu = args[10] != Py_None;
  const auto view = [&](void* data) { return View{data, layout.outer, layout.inner}; };
  void *y, *mean = nullptr, *invstd = nullptr, *mask = nullptr;
  Object results[4] = {make_alike(t.x, y), Object(), Object(), Object()};
  if (training || t.running_mean) {
    results[1] = make_channels(accumulator(t.x), t.x, mean);
    results[2] = make_channels(accumulator(t.x), t.x, invstd);
  }
  if (args[11] == Py_True && relu && t.residual) results[3] = make_mask(layout.shape, mask);
  Forward p{};
  p.shape = layout.shape, p.dtype = static_cast<DType>(t.x.dtype);
  p.moments = training, p.normalize = true, p.relu = relu;
  p.x = view(data_of(t.x.tensor)), p.residual = view(t.residual), p.y = view(y);
  p.mask = static_cast<std::uint8_t*>(mask);
  p.weight = t.weight, p.bias = t.bias, p.mean = mean, p.spread = invstd;
  p.running_mean = t.running_mean, p.running_var = t.running_var;
  p.counter = static_cast<std::int64_t*>(t.counter), p.cumulative = args[8] == Py_None;
  p.momentum = p.cumulative ? 0.0 : PyFloat_AsDouble(args[8]);
  p.eps = PyFloat_AsDouble(args[9]);
  p.record = static_cast<double*>(record);
  p.threads = static_cast<int>(PyLong_AsLong(args[13]));
  if (PyErr_Occurred()) return nullptr;
  {
    const Released others;
    cpu_kernels().forward(p);
  }
  return tuple_of(results);
}

// backward(dy, x, weight, bias, mean, invstd, mask, act, training, needs, record_gradient, record_affine, threads):
// `backward` of cpu.py; (dx, dweight, dbias, dresidual), or None.
PyObject* backward(PyObject* const* args) {
  Input x;
  Layout layout;
  ChannelVector weight, bias;
  void *dy, *mean, *invstd, *mask, *record_gradient, *record_affine;
  PyObject* const needs = args[9];
  if (args[0] == Py_None || !PyTuple_Check(needs) || PyTuple_GET_SIZE(needs) < 4 || !read_input(args[1], x) ||
      !dense_on_cpu(x, layout) || !read_alike(args[0], x, dy) || !read_channels(args[2], x, weight) ||
      !read_channels(args[3], x, bias) || !read_run(args[4], x, accumulator(x), x.channels, mean) ||
      !read_run(args[5], x, accumulator(x), x.channels, invstd) ||
      !read_run(args[6], x, dlpack::kUInt8, mask_bytes(layout.shape), mask) ||
      !read_run(args[10], x, dlpack::kFloat64, 7 * x.channels, record_gradient) ||
      !read_run(args[11], x, dlpack::kFloat64, 8 * x.channels, record_affine))
    Py_RETURN_NONE;
  const auto need = [&](int i) { return PyTuple_GET_ITEM(needs, i) == Py_True; };
  const auto view = [&](void* data) { return View{data, layout.outer, layout.inner}; };
  const bool need_x = need(0), need_weight = need(1), need_bias = need(2), training = args[8] == Py_True;
  void *dx = nullptr, *dresidual = nullptr;
  ChannelVector dweight{nullptr, weight.dtype}, dbias{nullptr, bias.dtype};
  const auto type_of = [](const ChannelVector& v) { return dlpack::kTypes[static_cast<int>(v.dtype)]; };
  Object results[4];
  if (need_x) results[0] = make_alike(x, dx);
  if (need_weight) results[1] = make_channels(type_of(weight), x, dweight.data);
  if (need_bias) results[2] = make_channels(type_of(bias), x, dbias.data);
  if (need(3)) results[3] = make_alike(x, dresidual);
  Backward p{};
  p.shape = layout.shape, p.dtype = static_cast<DType>(x.dtype);
  p.relu = args[7] != Py_None;
  p.dy = view(dy), p.x = view(data_of(x.tensor)), p.dx = view(dx), p.dresidual = view(dresidual);
  p.mask = static_cast<const std::uint8_t*>(mask);
  p.weight = weight, p.bias = bias, p.mean = mean, p.invstd = invstd;
  p.dweight = dweight, p.dbias = dbias;
  p.record_gradient = need_x ? static_cast<double*>(record_gradient) : nullptr;
  p.record_affine = mean ? static_cast<double*>(record_affine) : nullptr;
  // Without dx nothing is to be centred, and without sums there is nothing to centre by.
  p.sums = need_weight || need_bias || (need_x && training) || p.record_affine;
  p.input = dx || dresidual, p.training = training && need_x;
  p.threads = static_cast<int>(PyLong_AsLong(args[12]));
  if (PyErr_Occurred()) return nullptr;
  {
    const Released others;
    cpu_kernels().backward(p);
  }
  return tuple_of(results);
}

}  // namespace

bool add_calls(PyObject* module) {
  static PyMethodDef methods[] = {
      {"exchange", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<exchange, 3>)), METH_FASTCALL,
       "exchange(capsule, plain_types, is_neg): how tensors are read; whether it can be used."},
      {"usual", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<usual, 11>)), METH_FASTCALL,
       "Whether these arguments of batch_norm are plainly valid ones."},
      {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<forward, 14>)), METH_FASTCALL,
       "bnkern.backends.cpu.forward for plain dense tensors, or None."},
      {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<backward, 13>)), METH_FASTCALL,
       "bnkern.backends.cpu.backward for plain dense tensors, or None."},
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
