// Helpers for Python's C API: owned references, errors, and functions of a module.
#pragma once

#include <Python.h>

#include <exception>
#include <new>
#include <stdexcept>
#include <utility>

namespace bnkern {

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

struct PythonError {};  // thrown after a Python error was set

inline Object checked(PyObject* object) {
  if (!object) throw PythonError();
  return Object(object);
}

// Releases the GIL while the object exists, so other Python threads run at the same time.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  Released(const Released&) = delete;
  ~Released() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* const state_;
};

// Runs a kernel without the GIL. It is not inlined, because benchmarks/tools/instructions.py counts instructions
// between its entry and its return.
template <class Call>
[[gnu::noinline]] void run_released(void (*kernel)(const Call&), const Call& call) {
  {
    const Released without_gil;
    kernel(call);
  }
  asm volatile("");  // prevents a tail call, so the function ends with a return
}

// The objects as a tuple. An empty Object becomes None.
template <std::size_t size>
PyObject* tuple_of(Object (&objects)[size]) {
  Object tuple = checked(PyTuple_New(size));
  for (std::size_t i = 0; i < size; ++i) {
    PyObject* const object = objects[i].release();
    PyTuple_SET_ITEM(tuple.get(), i, object ? object : Py_NewRef(Py_None));
  }
  return tuple.release();
}

// A module function with `count` positional arguments. It converts C++ exceptions into Python errors.
template <PyObject* (*body)(PyObject* const*), Py_ssize_t count>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t size) {
  if (size != count) return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", count, size);
  try {
    return body(args);
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <PyObject* (*body)(PyObject* const*), Py_ssize_t count>
PyMethodDef method(const char* name, const char* doc) {
  auto* const function = reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&entry<body, count>));
  return {name, function, METH_FASTCALL, doc};
}

}  // namespace bnkern
