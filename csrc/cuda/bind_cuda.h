// The CUDA entries of the native module. A function of its own, since the tests make a second module of it whose
// kernels run on the host.
#pragma once

#include <pybind11/pybind11.h>

namespace bnkern {

void bind_cuda(pybind11::module_& m);

}  // namespace bnkern
