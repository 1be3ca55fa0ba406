// What Python hands to a kernel: plain addresses, sizes and strides. Strides count elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace bnkern {

// The fields of ForwardCall and BackwardCall in bnkern/backends/calls.py, in their order: a call reaches C++ as that
// tuple, and is read by position. The tests hold these lists to Python's.
// clang-format off: it does not settle on a form
#define BNKERN_FORWARD_FIELDS(FIELD)                                            \
  FIELD(x) FIELD(weight) FIELD(bias) FIELD(residual)                            \
  FIELD(running_mean) FIELD(running_var) FIELD(num_batches_tracked)             \
  FIELD(training) FIELD(momentum) FIELD(eps) FIELD(act) FIELD(save_mask) FIELD(record)
#define BNKERN_BACKWARD_FIELDS(FIELD)                                           \
  FIELD(dy) FIELD(x) FIELD(weight) FIELD(bias) FIELD(mean) FIELD(invstd)        \
  FIELD(mask) FIELD(act) FIELD(training) FIELD(needs) FIELD(record_gradient) FIELD(record_affine)
// clang-format on

// The activations, as bnkern/backends/activations.py lists them: the identity where z > 0 or z is NaN, linear
// elsewhere. csrc/cpu/activation.h and csrc/cuda/device.h compute them.
#define BNKERN_ACTIVATIONS(ACTIVATION) ACTIVATION(relu)
#define BNKERN_ENUMERATOR(name) , name
enum class Activation : std::uint8_t { none BNKERN_ACTIVATIONS(BNKERN_ENUMERATOR) };
#undef BNKERN_ENUMERATOR

// The two layouts of bnkern/backends/layout.py.
//   planes: element (n, c, s) lies at n * outer + c * inner + s
//   rows:   element (m, c)    lies at m * outer + c, with m = n * s running over all rows
struct Shape {
  bool rows;
  std::int64_t n, c, s;
};

struct View {
  void* data = nullptr;
  std::int64_t outer = 0, inner = 0;
  BNKERN_HD explicit operator bool() const { return data != nullptr; }
};

// One value per channel, contiguous. A null weight stands for ones, a null bias for zeros.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  BNKERN_HD explicit operator bool() const { return data != nullptr; }
};

// moments and normalize. Which run: `moments`, `normalize`, or both as one.
struct Forward {
  Shape shape;
  DType dtype;
  bool moments, normalize;
  Activation act;
  View x, residual, y;
  std::uint8_t* mask;  // written where not null
  ChannelVector weight, bias;
  // Accumulator type, [C]. mean: written by moments, read by normalize. spread: M2 where moments run
  // alone, else invstd, written or read likewise. Both null: identity normalisation.
  void *mean, *spread;
  ChannelVector running_mean, running_var;  // updated in place where not null
  std::int64_t* counter;                    // raised by one where not null
  bool cumulative;                          // momentum is 1 / counter
  double momentum, eps;
  double* record;  // with normalize, where not null: [8, C], the rows ACTIVATION of bnkern/backends/records.py
  int threads;
};

// grad_sums and grad_input. Which run: `sums`, `input`, or both as one.
struct Backward {
  Shape shape;
  DType dtype;
  bool sums, input;
  Activation act;
  bool training;              // grad_input subtracts the means of the sums
  View dy, x, dx, dresidual;  // dx, dresidual: written where not null
  const std::uint8_t* mask;   // null with an activation: recomputed from x
  ChannelVector weight, bias;
  const void *mean, *invstd;     // accumulator type, [C]; null: identity
  void *sum_dy, *sum_dy_xhat;    // accumulator type, [C]: written by sums, else read
  ChannelVector dweight, dbias;  // the sums once more, in the parameters' dtypes; where not null
  // Where not null: [7, C] with dx and [8, C] with sums, the rows GRADIENT and AFFINE of records.py.
  double *record_gradient, *record_affine;
  int threads;
};

// augment: a batch of CIFAR images, see bnkern/backends/reference/images.py.
struct Augment {
  const std::uint8_t* images;  // [n, 3, 32, 32]
  const std::int64_t* labels;  // [n]
  const std::int64_t* chosen;  // [count]: which of them make the batch
  std::int64_t count;
  const void* table;         // [3, 256]
  void* out;                 // [count, 3, 32, 32], dense
  std::int64_t* labels_out;  // [count]
  DType dtype;               // of table and out
  bool rows;                 // out is channels_last
  bool random;               // crop and flip
  std::uint64_t seed;
  std::uint32_t epoch;
  int threads;
};

// A tensor [N, C, H, W]: of unit stride along channels (channels_last) or along columns (NCHW).
struct Image {
  const void* data;
  std::int64_t n, c, h, w;
  std::int64_t stride_n, stride_c, stride_h, stride_w;
};

// conv_grad_signs: x [N, I, H, W], dy [N, O, H', W'], neither empty; results dense [O, I, kernel_h, kernel_w], null
// where not wanted. winograd: the sums come by F(2 x 2, 3 x 3), for float32 dense in channels_last, I and O multiples
// of 16, a 3 x 3 kernel, stride and padding 1.
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
