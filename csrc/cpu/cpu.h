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

// A call of conv_direct: a convolution with any kernel, stride and padding by its definition. x is [N, I, H, W] and y
// is [N, O, H', W']. Both are float32 and contiguous in channels_last, and O is a multiple of 16. With `transposed` it
// is the transposed convolution, which computes an input gradient: x is the gradient of the output, y that of the
// input, and the sizes of y belong to the call.
struct ConvDirect {
  const float* x;
  std::int64_t n, inputs, h, w;
  const float* weight;  // any strides
  std::int64_t weight_output, weight_input, weight_h, weight_w;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  bool transposed;
  float* y;
  std::int64_t outputs, y_h, y_w;
  int threads;
};

// A call of conv_norm_forward: the convolution r = conv3x3(y) of the output y of a batch norm, and the statistics of r.
// All tensors are float32 and contiguous in channels_last.
struct ConvNorm {
  Forward input;  // the call of normalize that computes y. If it has no x, then y is conv.x; if it has no y, then y is
                  // not stored
  Conv3x3 conv;   // conv.y is r
  const float*
      bias;        // [O], of the convolution, or null. It is not added to r, but the running mean is that of r + bias
  Forward output;  // the norm of r: mean and spread are written, and spread becomes invstd. If `moments` is set, they
                   // are those of r, and the running statistics are updated. Otherwise they are the running ones
};

// A call of conv_norm_backward. g is a gradient before the activation of a batch norm, z its value there.
struct ConvNormBackward {
  Backward output;            // the call of grad_input for the norm of r: its dy is g of this norm, its x is r
  const double* output_sums;  // [2, O]: the sums of g and of g * xhat of this norm
  Conv3x3 conv;    // from the gradient of r to that of y, with a flipped weight. conv.y receives g of the input's
                   // norm; if it is null, this gradient is not computed
  const float* y;  // if null, it is recomputed from `input`
  const float* shortcut;  // added to the gradient of y if not null
  float* dweight;         // [O, I, 3, 3], contiguous; not computed if null
  Backward input;         // the call of grad_sums for the norm of y. If it has no x, then y has no norm before it, and
                          // conv.y receives the gradient of y
  double* input_sums;     // [2, I], written
};

struct CpuKernels {
  const char* isa;
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
  void (*augment)(const Augment&);
  void (*conv_grad_signs)(const ConvGradSigns&);
  void (*conv3x3)(const Conv3x3&);
  void (*conv_direct)(const ConvDirect&);
  void (*conv_norm_forward)(const ConvNorm&);
  void (*conv_norm_backward)(const ConvNormBackward&);
  void (*update)(const Update&);
};

// The kernels of the best instruction set of this machine, or of the one that BNKERN_ISA names in the environment
// ("avx512", "avx2" or "generic"). Throws std::runtime_error if the machine or the build does not have that one.
const CpuKernels& cpu_kernels();

// Whether kernels may use instructions that only some machines with the instruction set have. BNKERN_EXTENSIONS=0
// forbids them, so that the tests can run the code for the other machines.
bool with_extensions();

// Each instruction set has its own definitions, compiled from the same sources. The tensors must not be empty.
#define BNKERN_DECLARE_ISA(isa)                       \
  namespace isa {                                     \
  void forward(const Forward& p);                     \
  void backward(const Backward& p);                   \
  void conv_grad_signs(const ConvGradSigns& p);       \
  void augment(const Augment& p);                     \
  void conv3x3(const Conv3x3& p);                     \
  void conv_direct(const ConvDirect& p);              \
  void conv_norm_forward(const ConvNorm& p);          \
  void conv_norm_backward(const ConvNormBackward& p); \
  void update(const Update& p);                       \
  }
BNKERN_DECLARE_ISA(generic)
BNKERN_DECLARE_ISA(avx2)
BNKERN_DECLARE_ISA(avx512)
#undef BNKERN_DECLARE_ISA

}  // namespace bnkern
