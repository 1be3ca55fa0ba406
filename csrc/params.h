// The arguments of the kernels: plain addresses, sizes and strides. Strides count elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bnkern {

// The fields of ForwardCall and BackwardCall in bnkern/backends/calls.py, in their order. A call reaches C++ as that
// tuple, and C++ reads its fields by position. The tests compare these lists with Python's.
// clang-format off: each run of clang-format would change these lines again
#define BNKERN_FORWARD_FIELDS(FIELD)                                            \
  FIELD(x) FIELD(weight) FIELD(bias) FIELD(residual)                            \
  FIELD(running_mean) FIELD(running_var) FIELD(num_batches_tracked)             \
  FIELD(training) FIELD(momentum) FIELD(eps) FIELD(act)                   \
  FIELD(save_mask) FIELD(record) FIELD(num_batches_skipped) FIELD(sample_weight)
#define BNKERN_BACKWARD_FIELDS(FIELD)                                           \
  FIELD(dy) FIELD(x) FIELD(weight) FIELD(bias) FIELD(mean) FIELD(invstd)        \
  FIELD(mask) FIELD(act) FIELD(training) FIELD(needs)                           \
  FIELD(record_gradient) FIELD(record_affine) FIELD(record_samples) FIELD(sample_weight)
// clang-format on

// The activations of bnkern/backends/activations.py. Each is the identity if z > 0 or z is NaN, and linear otherwise.
// csrc/cpu/activation.h and csrc/cuda/device.h compute them.
#define BNKERN_ACTIVATIONS(ACTIVATION) ACTIVATION(relu)
#define BNKERN_ENUMERATOR(name) , name
enum class Activation : std::uint8_t { none BNKERN_ACTIVATIONS(BNKERN_ENUMERATOR) };
#undef BNKERN_ENUMERATOR

// The two layouts of bnkern/backends/layout.py.
//   planes: element (n, c, s) is at n * outer + c * inner + s
//   rows:   element (m, c)    is at m * outer + c, where m counts all n * s rows
struct Shape {
  bool rows;
  std::int64_t n, c, s;
};

struct View {
  void* data = nullptr;
  std::int64_t outer = 0, inner = 0;
  BNKERN_HD explicit operator bool() const { return data != nullptr; }
};

// One value per channel, contiguous. A null weight means ones, and a null bias means zeros.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  BNKERN_HD explicit operator bool() const { return data != nullptr; }
};

// A call of moments, of normalize, or of both as one. `moments` and `normalize` select them.
struct Forward {
  Shape shape;
  DType dtype;
  bool moments, normalize;
  Activation act;
  View x, residual, y;
  std::uint8_t* mask;  // written if not null
  ChannelVector weight, bias;
  // [C], of the accumulator type. `spread` is M2 if moments runs alone, and invstd otherwise. moments writes both, and
  // normalize reads both. A call without moments but with running statistics writes those to both. If both are null,
  // the normalisation is the identity.
  void *mean, *spread;
  ChannelVector running_mean, running_var;  // updated in place if not null
  std::int64_t* counter;                    // increased by one if not null
  // If not null, it counts the batches whose statistics are not all finite. They change neither of the above.
  std::int64_t* skipped;
  bool cumulative;  // momentum is 1 / counter
  double momentum, eps;
  double* record;  // a call with normalize writes it if not null: [9, C], rows ACTIVATION of bnkern/backends/records.py
  // If not null, the weights of the values in moments: [N * S] in the order n, s, of the accumulator type. Only on the
  // CPU, and without a record.
  const void* sample_weight;
  int threads;
};

// A call of grad_sums, of grad_input, or of both as one. `sums` and `input` select them.
struct Backward {
  Shape shape;
  DType dtype;
  bool sums, input;
  Activation act;
  bool training;              // if true, grad_input subtracts the means of g and of g * xhat
  View dy, x, dx, dresidual;  // dx and dresidual are written if not null
  const std::uint8_t* mask;   // if null, the mask of an activation is recomputed from x
  ChannelVector weight, bias;
  const void *mean, *invstd;     // [C], of the accumulator type; null for the identity
  void *sum_dy, *sum_dy_xhat;    // [C], of the accumulator type; written with grad_sums, read by grad_input alone
  double* double_sums;           // [2, C], the same sums; written with grad_sums if not null, only on the CPU
  ChannelVector dweight, dbias;  // the same sums in the dtypes of the parameters, written if not null
  // The rows GRADIENT [8, C] and AFFINE [8, C] of records.py. If not null, they are written with dx and with the sums.
  double *record_gradient, *record_affine;
  double* record_samples;     // the rows SAMPLES [5, C], written with the sums if not null
  const void* sample_weight;  // that of the forward; null without weights
  int threads;
};

// A call of augment, which makes a batch of CIFAR images (bnkern/backends/reference/images.py).
struct Augment {
  const std::uint8_t* images;  // [n, 3, 32, 32]
  const std::int64_t* labels;  // [n]
  const std::int64_t* chosen;  // [count], the indices of the images in the batch
  std::int64_t count;
  const void* table;         // [3, 256]
  void* out;                 // [count, 3, 32, 32], without gaps
  std::int64_t* labels_out;  // [count]
  DType dtype;               // of table and out
  bool rows;                 // if true, `out` is channels_last
  bool random;               // if true, images are cropped and flipped at random
  std::uint64_t seed;
  std::uint32_t epoch;
  int threads;
};

// One parameter of an update: its first value and number of values in the flat tensors, and its gradient, which has the
// same order in memory. The gradient is bfloat16 if the parameter has a shadow, and otherwise of the update's dtype.
struct Segment {
  const void* gradient;
  std::int64_t first, count;
};
constexpr std::int64_t kSegmentAlign = 64;  // a segment begins at a multiple; sizes of flat tensors are multiples

// A call of update, which is one step of SGD for all parameters (bnkern/backends/reference/update.py).
struct Update {
  DType dtype;                       // of values, before and velocity: fp32 or fp64
  void *values, *before, *velocity;  // velocity may be null
  BFloat16* shadow;                  // of the first values
  std::int64_t shadow_size;          // 0 if there is no shadow
  const Segment* segments;           // in the order of their first values
  std::int64_t segment_count;
  const float *lr, *stop;  // scalars on the device
  double momentum, weight_decay;
  int threads;
};

// A tensor [N, C, H, W]. Its stride is 1 along channels (channels_last) or along columns (NCHW).
struct Image {
  const void* data;
  std::int64_t n, c, h, w;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
};

// A call of conv_grad_signs. x is [N, I, H, W] and dy is [N, O, H', W'], and neither is empty. The results are
// contiguous, [O, I, kernel_h, kernel_w], and a result that is null is not computed. With `winograd` the sums are
// computed by F(2 x 2, 3 x 3). This requires float32 tensors that are contiguous in channels_last, I and O that are
// multiples of 16, a 3 x 3 kernel, and stride and padding 1.
struct ConvGradSigns {
  DType dtype;
  Image x, dy;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  void *sum, *abs_sum;  // accumulator type
  std::int32_t *sign_sum, *nonzero;
  bool winograd;
  int threads;
};

}  // namespace bnkern
