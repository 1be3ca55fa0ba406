// The update of all parameters with torch's tensors, on the CPU or a CUDA device.
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/cpu.h"
#include "calls.h"
#include "tensors.h"

namespace bnkern {
namespace {

[[noreturn]] void refuse(const std::string& name, const char* expected) {
  throw std::invalid_argument("update: " + name + " must be " + expected);
}

// Reads a contiguous vector, or a scalar if `size` is 0. Any size is accepted if `size` is -1.
Tensor flat(PyObject* object, const char* name, const char* expected, const dlpack::Device& device,
            dlpack::DataType type, std::int64_t size) {
  Tensor t;
  if (!read(object, t) || !(t.device == device) || !(t.dtype == type) || t.ndim != (size != 0)) refuse(name, expected);
  if (size != 0 && (t.strides[0] != 1 || (size > 0 && t.shape[0] != size) || t.shape[0] % kSegmentAlign))
    refuse(name, expected);
  return t;
}

// Whether two tensors have equal sizes, and equal strides where a size is not 1.
bool laid_out_alike(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int axis = 0; axis < a.ndim; ++axis)
    if (a.shape[axis] != b.shape[axis] || (a.shape[axis] != 1 && a.strides[axis] != b.strides[axis])) return false;
  return true;
}

std::int64_t elements(const Tensor& t) {
  std::int64_t count = 1;
  for (int axis = 0; axis < t.ndim; ++axis) count *= t.shape[axis];
  return count;
}

double number(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (PyErr_Occurred()) throw PythonError();
  return value;
}

// update(parameters, gradients, values, before, velocity, shadow, lr, stop, momentum, weight_decay): see Update in
// params.h. It reads two tensors for each parameter, which takes some 60 ns.
PyObject* update(PyObject* const* args) {
  PyObject *const parameters = args[0], *const gradients = args[1];
  if (!PyList_Check(parameters) || !PyList_Check(gradients) || !PyList_GET_SIZE(parameters) ||
      PyList_GET_SIZE(parameters) != PyList_GET_SIZE(gradients))
    refuse("parameters and gradients", "lists of the same length, which are not empty");
  constexpr const char* kValues = "a float32 or float64 vector on the CPU or a CUDA device, of a multiple of 64 values";
  constexpr const char* kFlat = "like values";
  Tensor values;
  if (!read(args[2], values) || (values.device.type != dlpack::kCpu && values.device.type != dlpack::kCuda) ||
      !(values.dtype == dlpack::kFloat32 || values.dtype == dlpack::kFloat64))
    refuse("values", kValues);
  const dlpack::Device device = values.device;
  const dlpack::DataType type = values.dtype, half = dlpack::kTypes[static_cast<int>(DType::kBFloat16)];
  flat(args[2], "values", kValues, device, type, -1);
  const std::int64_t size = values.shape[0];
  Tensor velocity, shadow;
  if (args[4] != Py_None) velocity = flat(args[4], "velocity", kFlat, device, type, size);
  if (args[5] != Py_None)
    shadow = flat(args[5], "shadow", "a bfloat16 vector of at most as many values", device, half, -1);
  Update p{
      .dtype = type == dlpack::kFloat64 ? DType::kFloat64 : DType::kFloat32,
      .values = values.data,
      .before = flat(args[3], "before", kFlat, device, type, size).data,
      .velocity = velocity.data,
      .shadow = static_cast<BFloat16*>(shadow.data),
      .shadow_size = shadow.data ? shadow.shape[0] : 0,
      .segments = nullptr,
      .segment_count = PyList_GET_SIZE(parameters),
      .lr = static_cast<float*>(flat(args[6], "lr", "a float32 scalar", device, dlpack::kFloat32, 0).data),
      .stop = static_cast<float*>(flat(args[7], "stop", "a float32 scalar", device, dlpack::kFloat32, 0).data),
      .momentum = number(args[8]),
      .weight_decay = number(args[9]),
      .threads = threads(),
  };
  if (p.shadow_size > (p.dtype == DType::kFloat32 ? size : 0)) refuse("shadow", "absent, or as long as values at most");
  std::vector<Segment> segments;
  segments.reserve(p.segment_count);
  std::int64_t end = 0;  // of the previous segment
  for (Py_ssize_t i = 0; i < p.segment_count; ++i) {
    Tensor parameter, gradient;
    const auto check = [&](bool valid, const char* name, const char* expected) {
      if (!valid) refuse(std::string(name) + ' ' + std::to_string(i), expected);
    };
    check(read(PyList_GET_ITEM(parameters, i), parameter) && parameter.device == device && parameter.dtype == type,
          "parameter", "a tensor like values");
    const std::int64_t bytes = static_cast<const char*>(parameter.data) - static_cast<const char*>(values.data);
    const std::int64_t first = bytes / (type.bits / 8), count = elements(parameter);
    check(bytes % (kSegmentAlign * type.bits / 8) == 0 && first >= end && first + count <= size, "parameter",
          "a view of values behind the one before it, and begin at a multiple of 64 values");
    end = first + count;
    const bool shadowed = first < p.shadow_size;
    check(read(PyList_GET_ITEM(gradients, i), gradient) && gradient.device == device &&
              gradient.dtype == (shadowed ? half : type) && laid_out_alike(gradient, parameter),
          "gradient",
          shadowed ? "bfloat16, with the shape and strides of the parameter"
                   : "of the dtype, the shape and the strides of the parameter");
    segments.push_back({gradient.data, first, count});
  }
  p.segments = segments.data();
  if (device.type == dlpack::kCpu)
    run_released(cpu_kernels().update, p);
  else
    launch_cuda(p, args[2], device);
  Py_RETURN_NONE;
}

}  // namespace

bool add_update(PyObject* module) {
  static PyMethodDef methods[] = {
      method<update, 10>("update",
                         "update(parameters, gradients, values, before, velocity, shadow, lr, stop, momentum, "
                         "weight_decay): one step of SGD; see Update in csrc/params.h."),
      {nullptr, nullptr, 0, nullptr},
  };
  return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace bnkern
