// The functions of the native module that take torch's tensors.
#pragma once

#include <Python.h>

#include <string>

#include "dlpack.h"

namespace bnkern {

struct Forward;
struct Backward;
struct Update;
struct CudaConvNorm;

// Add the functions of batch_norm.cpp, convolution.cpp, conv_norm.cpp and update.cpp to the module. They return false
// and set a Python error if they fail.
bool add_calls(PyObject* module);
bool add_cpu_functions(PyObject* module);
bool add_conv_norm(PyObject* module);
bool add_update(PyObject* module);

// Queues a call whose tensors are on a CUDA device. `x` is one of these tensors.
void launch_cuda(Forward& p, PyObject* x, const dlpack::Device& device);
void launch_cuda(Backward& p, PyObject* x, const dlpack::Device& device);
void launch_cuda(Update& p, PyObject* values, const dlpack::Device& device);
void launch_cuda(CudaConvNorm& p, PyObject* x, const dlpack::Device& device);

// conv_norm_refusal() of csrc/cuda/kernels.h for a device.
std::string cuda_refusal(CudaConvNorm& p, const dlpack::Device& device);

}  // namespace bnkern
