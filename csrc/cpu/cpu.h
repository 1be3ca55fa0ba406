// The interface of the CPU kernels, whose instruction set is chosen at run time.
#pragma once

#include <string>

#include "../params.h"

namespace bnkern {

// A call of conv3x3. x is [N, I, H, W] and y is [N, O, H, W]. Both are float32 and contiguous in channels_last, and I
// and O are multiples of 16. The weight may have any strides, also negative ones.
struct Conv3x3 {
  const float* x;
  std::int64_t n, inputs, outputs, h, w;
  const float* weight;
  std::int64_t weight_output, weight_input, weight_h, weight_w;
  float* y;
  int threads;
};

struct CpuKernels {
  const char* isa;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*augment)(const Augment&);
  void (*conv_grad_signs)(const ConvGradSigns&);
  void (*conv3x3)(const Conv3x3&);
  void (*update)(const Update&);
};

// The kernels of the best instruction set of this machine, or of the one that BNKERN_ISA names in the environment
// ("avx512", "avx2" or "generic"). Throws std::runtime_error if the machine or the build does not have that one.
const CpuKernels& cpu_kernels();

// Whether kernels may use instructions that only some machines with the instruction set have. BNKERN_EXTENSIONS=0
// forbids them, so that the tests can run the code for the other machines.
bool with_extensions();

// Each instruction set has its own definitions, compiled from the same sources. The tensors must not be empty.
#define BNKERN_DECLARE_ISA(isa)                 \
  namespace isa {                               \
  void forward(const Forward& p);               \
  void backward(const Backward& p);             \
  void conv_grad_signs(const ConvGradSigns& p); \
  void augment(const Augment& p);               \
  void conv3x3(const Conv3x3& p);               \
  void update(const Update& p);                 \
  }
BNKERN_DECLARE_ISA(generic)
BNKERN_DECLARE_ISA(avx2)
BNKERN_DECLARE_ISA(avx512)
#undef BNKERN_DECLARE_ISA

}  // namespace bnkern
