// torch's tensors, read and made from C++ without a header of torch.
//
// They are read through DLPack's exchange table, which takes some tens of nanoseconds where attributes read in Python
// take microseconds. For a torch without the table the same functions ask bnkern/backends/native.py, which is slow.
#pragma once

#include <memory>

#include "dlpack.h"
#include "python.h"

namespace bnkern {

// What a kernel must know of a tensor. Strides count elements.
struct Tensor {
  void* data = nullptr;
  dlpack::Device device{};
  dlpack::DataType dtype{};
  int ndim = 0;
  const std::int64_t *shape = nullptr, *strides = nullptr;  // they live as long as the tensor, or are `owned`
  std::unique_ptr<std::int64_t[]> owned;
};

// connect(module): takes what is needed from bnkern/backends/native.py, before any other call. Returns whether tensors
// are read through the exchange table.
PyObject* connect(PyObject* const* args);

// False where the object is no plain tensor whose elements are in memory: another type, a subclass, empty, sparse,
// meta, of a transform.
bool read(PyObject* object, Tensor& tensor);

// Whether the elements in memory are the negated values (torch.Tensor.is_neg), of which DLPack does not tell.
bool negated(PyObject* tensor);

// A new uninitialised tensor on the device of the tensor `like`, and where its elements lie: on the CPU large ones are
// from the pool (cpu/pool.h), on others torch makes them, from its caching allocator.
Object make(PyObject* like, const dlpack::Device& device, dlpack::DataType type, int ndim, const std::int64_t* shape,
            const std::int64_t* strides, void*& data);

// layout.output_strides of a tensor whose results do not have its own strides, kept by Python: a tuple of ints.
Object output_strides(const Tensor& tensor);

// torch's current stream of the device.
void* current_stream(PyObject* like, const dlpack::Device& device);

// How many threads torch's operators use.
int threads();

// The types of calls.py, and the field of a call. Throws a TypeError where it is not of that type.
void check_forward_call(PyObject* call);
void check_backward_call(PyObject* call);

}  // namespace bnkern
