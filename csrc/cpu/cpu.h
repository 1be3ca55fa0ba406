// What the CPU part offers to bind.cpp: the kernels of the instruction set chosen at run time.
#pragma once

#include <string>

#include "../params.h"

namespace bnkern {

// conv3x3: x [N, I, H, W] and y [N, O, H, W], float32, dense in channels_last, I and O multiples of 16; the weight's
// strides are free, and may be negative.
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
};

// The best that this machine runs, or the one named by BNKERN_ISA in the environment ("avx512", "avx2",
// "generic"). Throws std::runtime_error where a named one cannot run here.
const CpuKernels& cpu_kernels();

// Whether instructions may be used that not every machine with such a set has: not with BNKERN_EXTENSIONS=0, by which
// the others are tested.
bool with_extensions();

// One definition per instruction set, from the same sources. The tensors must not be empty.
#define BNKERN_DECLARE_ISA(isa)                 \
  namespace isa {                               \
  void forward(const Forward& p);               \
  void backward(const Backward& p);             \
  void conv_grad_signs(const ConvGradSigns& p); \
  void augment(const Augment& p);               \
  void conv3x3(const Conv3x3& p);               \
  }
BNKERN_DECLARE_ISA(generic)
BNKERN_DECLARE_ISA(avx2)
BNKERN_DECLARE_ISA(avx512)
#undef BNKERN_DECLARE_ISA

}  // namespace bnkern
