// Batch norm from a call of bnkern/backends/calls.py to the kernels, for every device.
//
// Each function reads the tensors of its call once, and checks at the same time whether the kernels support them. If
// not, it returns None before it writes or allocates anything. Then Python raises an error, calls the reference, or
// makes dense copies of the operands (bnkern/backends/native.py). Results are tensors of torch.
#include <algorithm>
#include <stdexcept>

#include "../cpu/cpu.h"
#include "calls.h"
#include "operands.h"

namespace bnkern {
namespace {

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

// forward(call, validated) -> (y, mean, invstd, mask), or None. Other calls must be certainly_valid().
PyObject* forward(PyObject* const* args) {
  check_forward_call(args[0]);
  const Fields<F> field(args[0]);
  Input x;
  Forward p{};
  if (!read_forward(field, x, p) || !x.read_weights(field[F::sample_weight], p.sample_weight) ||
      (p.sample_weight && p.record) || !read_running(field, x, p) ||
      (args[1] != Py_True && !certainly_valid(args[0], field, x)))
    Py_RETURN_NONE;
  p.moments = field(F::training), p.normalize = true;
  read_numbers(field, p);
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
