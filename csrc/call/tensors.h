// Functions that read and make torch's tensors in C++, without a header of torch.
//
// Tensors are read through DLPack's exchange table, which takes some tens of nanoseconds. To read attributes in Python
// takes microseconds. If torch has no table, the same functions call bnkern/backends/native.py, which is slow.
#pragma once

#include <memory>

#include "dlpack.h"
#include "python.h"

namespace bnkern {

// The description of a tensor that kernels need. Strides count elements.
struct Tensor {
  void* data = nullptr;
  dlpack::Device device{};
  dlpack::DataType dtype{};
  int ndim = 0;
  const std::int64_t *shape = nullptr, *strides = nullptr;  // valid as long as torch's tensor, or in `owned`
  std::unique_ptr<std::int64_t[]> owned;
};

// connect(module) reads the required names from bnkern/backends/native.py. It must be the first call. Returns whether
// tensors are read through the exchange table.
PyObject* connect(PyObject* const* args);

// Returns false if the object is not a plain tensor with elements in memory: another type, a subclass, or a tensor that
// is empty, sparse, meta, or belongs to a transform.
bool read(PyObject* object, Tensor& tensor);

// Whether the elements in memory are the negated values (torch.Tensor.is_neg). DLPack does not expose this.
bool negated(PyObject* tensor);

// Makes an uninitialised tensor on the device of the tensor `like`, and sets `data` to the address of its elements. On
// the CPU the memory of large tensors comes from the pool (cpu/pool.h). On other devices torch makes the tensor, with
// its caching allocator.
Object make(PyObject* like, const dlpack::Device& device, dlpack::DataType type, int ndim, const std::int64_t* shape,
            const std::int64_t* strides, void*& data);

// layout.output_strides of a tensor whose results do not have its own strides. Returns a tuple of ints, which Python
// caches.
Object output_strides(const Tensor& tensor);

// torch's current stream of the device.
void* current_stream(PyObject* like, const dlpack::Device& device);

// The number of threads of torch's operators.
int threads();

// Check that an object has a type of calls.py. They throw a TypeError if it does not.
void check_forward_call(PyObject* call);
void check_backward_call(PyObject* call);

}  // namespace bnkern
