#include "tensors.h"

#include <iterator>

namespace bnkern {
namespace {

// The objects that connect() read from Python. Their references are never released.
struct Torch {
  const dlpack::ExchangeApi* table = nullptr;
  PyObject *plain_types, *is_neg, *describe, *from_dlpack, *empty_strided, *dtypes, *output_strides, *get_num_threads,
      *current_stream, *forward_call, *backward_call;
} torch;

struct Name {
  const char* name;
  PyObject* Torch::* member;
};
constexpr Name kNames[] = {
    {"PLAIN_TYPES", &Torch::plain_types},
    {"is_neg", &Torch::is_neg},
    {"describe", &Torch::describe},
    {"from_dlpack", &Torch::from_dlpack},
    {"empty_strided", &Torch::empty_strided},
    {"DTYPES", &Torch::dtypes},
    {"output_strides", &Torch::output_strides},
    {"get_num_threads", &Torch::get_num_threads},
    {"current_stream", &Torch::current_stream},
    {"ForwardCall", &Torch::forward_call},
    {"BackwardCall", &Torch::backward_call},
};

// The table of torch, from a capsule or, before December 2025, from an address. Null if the object is neither of them.
const dlpack::ExchangeApi* table_of(PyObject* object) {
  constexpr const char* kCapsule = "dlpack_exchange_api";
  const void* pointer = nullptr;
  if (PyCapsule_IsValid(object, kCapsule))
    pointer = PyCapsule_GetPointer(object, kCapsule);
  else if (PyLong_CheckExact(object))
    pointer = PyLong_AsVoidPtr(object);
  const auto* const table = static_cast<const dlpack::ExchangeApi*>(pointer);
  const bool usable = table && table->version.major == dlpack::kVersion.major && table->view_of_object;
  return usable ? table : nullptr;
}

PyObject* tuple_of_integers(const std::int64_t* values, int count) {
  Object tuple = checked(PyTuple_New(count));
  for (int i = 0; i < count; ++i) PyTuple_SET_ITEM(tuple.get(), i, checked(PyLong_FromLongLong(values[i])).release());
  return tuple.release();
}

std::int64_t integer(PyObject* tuple, Py_ssize_t i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)); }

// native.describe(tensor) -> (address, device type, device index, dtype's code, shape, strides), or None.
bool read_in_python(PyObject* object, Tensor& tensor) {
  const Object description = checked(PyObject_CallOneArg(torch.describe, object));
  if (description.get() == Py_None) return false;
  PyObject *shape, *strides;
  Py_ssize_t address;
  int type, index, code;
  if (!PyArg_ParseTuple(description.get(), "niiiO!O!", &address, &type, &index, &code, &PyTuple_Type, &shape,
                        &PyTuple_Type, &strides))
    throw PythonError();
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device = {type, index};
  tensor.dtype = dlpack::kTypes[code];
  tensor.ndim = static_cast<int>(PyTuple_GET_SIZE(shape));
  tensor.owned = std::make_unique<std::int64_t[]>(2 * tensor.ndim + 1);
  for (int axis = 0; axis < tensor.ndim; ++axis) {
    tensor.owned[axis] = integer(shape, axis);
    tensor.owned[tensor.ndim + axis] = integer(strides, axis);
  }
  tensor.shape = tensor.owned.get(), tensor.strides = tensor.shape + tensor.ndim;
  return tensor.data;
}

void give_back(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, dlpack::kCapsule)) return;  // torch owns the tensor, and has renamed the capsule
  auto* const managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
  managed->deleter(managed);
}

Object adopt(dlpack::Managed* managed) {
  if (torch.table) {
    void* object;
    if (torch.table->object_from_managed(managed, &object) != 0) throw PythonError();
    return Object(static_cast<PyObject*>(object));
  }
  const Object capsule = checked(PyCapsule_New(managed, dlpack::kCapsule, give_back));
  return checked(PyObject_CallOneArg(torch.from_dlpack, capsule.get()));
}

// torch.empty_strided(shape, strides, dtype=dtype, device=like.device)
Object make_in_torch(PyObject* like, dlpack::DataType type, int ndim, const std::int64_t* shape,
                     const std::int64_t* strides) {
  static PyObject* const names = PyTuple_Pack(2, PyUnicode_FromString("dtype"), PyUnicode_FromString("device"));
  static PyObject* const device_name = PyUnicode_InternFromString("device");
  Py_ssize_t code = 0;
  while (!(dlpack::kTypes[code] == type)) ++code;
  const Object sizes(tuple_of_integers(shape, ndim)), steps(tuple_of_integers(strides, ndim));
  const Object device = checked(PyObject_GetAttr(like, device_name));
  PyObject* const args[] = {sizes.get(), steps.get(), PyTuple_GET_ITEM(torch.dtypes, code), device.get()};
  return checked(PyObject_Vectorcall(torch.empty_strided, args, 2, names));
}

void check_type(PyObject* call, PyObject* type) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(call)) == type) return;
  PyErr_Format(PyExc_TypeError, "expected a %s, got %s", reinterpret_cast<PyTypeObject*>(type)->tp_name,
               Py_TYPE(call)->tp_name);
  throw PythonError();
}

}  // namespace

PyObject* connect(PyObject* const* args) {
  for (const auto& [name, member] : kNames) torch.*member = checked(PyObject_GetAttrString(args[0], name)).release();
  const Object table = checked(PyObject_GetAttrString(args[0], "exchange_table"));
  torch.table = table_of(table.get());
  if (PyErr_Occurred()) throw PythonError();
  return PyBool_FromLong(torch.table != nullptr);
}

bool read(PyObject* object, Tensor& tensor) {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  for (Py_ssize_t i = 0; PyTuple_GET_ITEM(torch.plain_types, i) != type;)
    if (++i == PyTuple_GET_SIZE(torch.plain_types)) return false;
  if (!torch.table) return read_in_python(object, tensor);
  dlpack::Tensor view;
  if (torch.table->view_of_object(object, &view) != 0) {
    PyErr_Clear();  // a sparse or meta tensor, or one of a transform
    return false;
  }
  if (!view.data) return false;  // an empty tensor, or zeros without storage
  tensor.data = static_cast<char*>(view.data) + view.byte_offset;
  tensor.device = view.device, tensor.dtype = view.dtype, tensor.ndim = view.ndim;
  tensor.shape = view.shape, tensor.strides = view.strides;
  return true;
}

bool negated(PyObject* tensor) {
  if (tensor == Py_None) return false;
  const Object is_neg(PyObject_Vectorcall(torch.is_neg, &tensor, 1, nullptr));
  if (!is_neg.get()) PyErr_Clear();
  return is_neg.get() != Py_False;
}

Object make(PyObject* like, const dlpack::Device& device, dlpack::DataType type, int ndim, const std::int64_t* shape,
            const std::int64_t* strides, void*& data) {
  if (device.type == dlpack::kCpu) {
    dlpack::Managed* const managed = dlpack::empty(type, ndim, shape, strides);
    data = managed->tensor.data;
    return adopt(managed);
  }
  Object object = make_in_torch(like, type, ndim, shape, strides);
  Tensor tensor;
  if (!read(object.get(), tensor))
    throw std::runtime_error("torch.empty_strided returned a tensor that cannot be read");
  data = tensor.data;
  return object;
}

Object output_strides(const Tensor& t) {
  const Object shape(tuple_of_integers(t.shape, t.ndim)), strides(tuple_of_integers(t.strides, t.ndim));
  PyObject* const args[] = {shape.get(), strides.get()};
  return checked(PyObject_Vectorcall(torch.output_strides, args, 2, nullptr));
}

void* current_stream(PyObject* like, const dlpack::Device& device) {
  if (torch.table && torch.table->current_stream) {
    void* stream = nullptr;
    if (torch.table->current_stream(device.type, device.id, &stream) != 0) throw PythonError();
    return stream;
  }
  const Object stream = checked(PyObject_CallOneArg(torch.current_stream, like));
  return PyLong_AsVoidPtr(stream.get());
}

int threads() {
  const Object count = checked(PyObject_CallNoArgs(torch.get_num_threads));
  return static_cast<int>(PyLong_AsLong(count.get()));
}

void check_forward_call(PyObject* call) { check_type(call, torch.forward_call); }
void check_backward_call(PyObject* call) { check_type(call, torch.backward_call); }

}  // namespace bnkern
