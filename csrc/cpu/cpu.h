// What the CPU part offers to bind.cpp: the kernels of the instruction set chosen at run time.
#pragma once

#include <string>

#include "../params.h"

namespace bnkern {

struct CpuKernels {
  const char* isa;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*augment)(const Augment&);
};

// The best that this machine runs, or the one named by BNKERN_ISA in the environment ("avx512", "avx2",
// "generic"). Throws std::runtime_error where a named one cannot run here.
const CpuKernels& cpu_kernels();

// One definition per instruction set, from the same sources. The tensors must not be empty.
#define BNKERN_DECLARE_ISA(isa)     \
  namespace isa {                   \
  void forward(const Forward& p);   \
  void backward(const Backward& p); \
  void augment(const Augment& p);   \
  }
BNKERN_DECLARE_ISA(generic)
BNKERN_DECLARE_ISA(avx2)
BNKERN_DECLARE_ISA(avx512)
#undef BNKERN_DECLARE_ISA

}  // namespace bnkern
