// The CUDA entries of the native module. A function of its own, in a file that only builds with CUDA compile.
#pragma once

#include <pybind11/pybind11.h>

namespace bnkern {

void bind_cuda(pybind11::module_& m);

}  // namespace bnkern
