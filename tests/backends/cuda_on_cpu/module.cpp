// csrc/call over the kernels on the host, as a Python module. With BNKERN_CUDA_ON_CPU it takes tensors on the CPU.
#include <stdexcept>

#include "../../../csrc/call/calls.h"
#include "../../../csrc/call/cuda.h"
#include "../../../csrc/cpu/cpu.h"

namespace bnkern {
const CpuKernels& cpu_kernels() { throw std::runtime_error("there are no CPU kernels here"); }
}  // namespace bnkern

extern "C" {
PyObject* native_module() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "native_on_cpu";
  definition.m_size = -1;
  PyObject* const module = PyModule_Create(&definition);
  if (module && !(bnkern::add_calls(module) && bnkern::add_conv_norm(module) && bnkern::add_update(module))) return nullptr;
  return module;
}
void register_device(const bnkern::CudaDevice* device, std::int64_t single_read_from) {
  bnkern::register_cuda_device(0, *device, single_read_from);
}
}
