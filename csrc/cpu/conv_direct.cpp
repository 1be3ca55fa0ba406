// A convolution by its definition, for float32 in channels_last: those that Winograd's form does not serve, with stride
// 2, a 1 x 1 kernel, or few input channels.
//
// A tap is an element of the kernel. A convolution computes all pixels of its output from all taps. In a transposed
// convolution of stride s the taps of an output pixel depend on its row and column modulo s, so it has s x s phases.
// A phase is a grid of output pixels with common taps:
//
//   y[first + a * y_step] = sum over taps of weight[tap] x[a * x_step + tap's offset]        (rows and columns alike)
//
// Each sum is a chain of fma over taps and input channels, in this order.
#include <omp.h>

#include <vector>

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

constexpr std::int64_t kBlockElements = 16384;  // of x, for the rows of the grid that are computed together

struct Tap {
  std::int64_t row, column;  // offsets in x
  std::int64_t weight;       // its place in the kernel
};

// A phase along one axis.
struct Axis {
  std::int64_t first, count;  // its first index in y, and the number of its indices
  std::vector<std::int64_t> kernel, offsets;
};

std::vector<Axis> axes_of(bool transposed, std::int64_t y_size, std::int64_t kernel, std::int64_t stride,
                          std::int64_t padding) {
  std::vector<Axis> axes(transposed ? stride : 1);
  for (std::int64_t phase = 0; phase < static_cast<std::int64_t>(axes.size()); ++phase) {
    Axis& axis = axes[phase];
    axis.first = phase;
    axis.count = transposed ? divide_up(std::max<std::int64_t>(y_size - phase, 0), stride) : y_size;
    for (std::int64_t k = 0; k < kernel; ++k) {
      if (!transposed) {
        axis.kernel.push_back(k), axis.offsets.push_back(k - padding);
      } else if ((phase + padding - k) % stride == 0) {
        axis.kernel.push_back(k), axis.offsets.push_back((phase + padding - k) / stride);
      }
    }
  }
  return axes;
}

// The product of kTiles pixels of the grid and 16 kVectors outputs.
template <int kTiles, int kVectors>
BNKERN_INLINE void pixels(const std::vector<Tap>& taps, const float* x, std::int64_t x_row, std::int64_t x_pixel,
                          std::int64_t step, const float* weights, std::int64_t inputs, float* y, std::int64_t y_step) {
  V sums[kTiles][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) sums[t][q] = V::all(0);
  for (const Tap& tap : taps) {
    const float* const from = x + tap.row * x_row + tap.column * x_pixel;
    const float* weight = weights + tap.weight * inputs * kVectors * kLanes;
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < inputs; ++i, weight += kVectors * kLanes) {
      V w[kVectors];
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) w[q] = V::load(weight + q * kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTiles; ++t) {
        const V value = V::all(from[t * step + i]);
#pragma GCC unroll 4
        for (int q = 0; q < kVectors; ++q) sums[t][q] = fma(value, w[q], sums[t][q]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) sums[t][q].store(y + t * y_step + q * kLanes);
}

template <int kTiles, int kVectors>
class Direct {
 public:
  explicit Direct(const ConvDirect& p)
      : p_(p),
        rows_(axes_of(p.transposed, p.y_h, p.kernel_h, p.stride_h, p.padding_h)),
        columns_(axes_of(p.transposed, p.y_w, p.kernel_w, p.stride_w, p.padding_w)),
        x_step_h_(p.transposed ? 1 : p.stride_h),
        x_step_w_(p.transposed ? 1 : p.stride_w),
        y_step_h_(p.transposed ? p.stride_h : 1),
        y_step_w_(p.transposed ? p.stride_w : 1),
        top_(least_offset(rows_)),
        left_(least_offset(columns_)),
        height_(most_offset(rows_) - top_ + 1),
        width_((columns_[0].count - 1) * x_step_w_ + most_offset(columns_) - left_ + 1),
        row_(width_ * p.inputs) {
    const std::int64_t taps = p.kernel_h * p.kernel_w;
    weight_size_ = taps * p.inputs * p.outputs;
    const std::int64_t grid = rows_[0].count;
    const std::int64_t most = std::max<std::int64_t>(1, (kBlockElements / row_ - height_) / x_step_h_ + 1);
    block_ = divide_up(grid, divide_up(grid, most));
    blocks_ = divide_up(grid, block_);
  }

  void run() const {
    const std::int64_t x_size = round_up(((block_ - 1) * x_step_h_ + height_) * row_, kLanes);
    const int threads = static_cast<int>(std::min<std::int64_t>(p_.threads, p_.n * blocks_));
    const PoolSpace pool((weight_size_ + threads * x_size) * static_cast<std::int64_t>(sizeof(float)));
    float* const weights = reinterpret_cast<float*>(pool.data());
#pragma omp parallel num_threads(threads)
    {
      float* const x = weights + weight_size_ + omp_get_thread_num() * x_size;
#pragma omp for schedule(static)
      for (std::int64_t k = 0; k < p_.kernel_h * p_.kernel_w; ++k) pack_weights(k, weights);
#pragma omp for schedule(static)
      for (std::int64_t unit = 0; unit < p_.n * blocks_; ++unit) {
        const std::int64_t image = unit / blocks_, from = unit % blocks_ * block_;
        block(image, from, std::min(from + block_, rows_[0].count), weights, x);
      }
    }
  }

 private:
  static constexpr std::int64_t kOutputs = kVectors * kLanes;

  static std::int64_t least_offset(const std::vector<Axis>& axes) {
    std::int64_t least = 0;
    for (const Axis& axis : axes)
      for (const std::int64_t offset : axis.offsets) least = std::min(least, offset);
    return least;
  }
  static std::int64_t most_offset(const std::vector<Axis>& axes) {
    std::int64_t most = 0;
    for (const Axis& axis : axes)
      for (const std::int64_t offset : axis.offsets) most = std::max(most, offset);
    return most;
  }

  // Packs one tap of the kernel: [outputs / kOutputs][tap][input][kOutputs].
  void pack_weights(std::int64_t k, float* weights) const {
    const float* const from = p_.weight + k / p_.kernel_w * p_.weight_h + k % p_.kernel_w * p_.weight_w;
    for (std::int64_t o = 0; o < p_.outputs; ++o) {
      float* const to = weights + (o / kOutputs * p_.kernel_h * p_.kernel_w + k) * p_.inputs * kOutputs + o % kOutputs;
      for (std::int64_t i = 0; i < p_.inputs; ++i) to[i * kOutputs] = from[o * p_.weight_output + i * p_.weight_input];
    }
  }

  // Copies the rows of x for rows [from, to) of the grid, with zeros around the image.
  void pack_rows(std::int64_t image, std::int64_t from, std::int64_t to, float* out) const {
    const std::int64_t before = std::min(-left_, width_), length = std::clamp<std::int64_t>(width_ - before, 0, p_.w);
    const std::int64_t last = (to - 1) * x_step_h_ + top_ + height_;
    for (std::int64_t row = from * x_step_h_ + top_; row < last; ++row, out += row_) {
      if (row < 0 || row >= p_.h) {
        std::fill_n(out, row_, 0.0f);
        continue;
      }
      std::fill_n(out, before * p_.inputs, 0.0f);
      std::memcpy(out + before * p_.inputs, p_.x + (image * p_.h + row) * p_.w * p_.inputs,
                  length * p_.inputs * sizeof(float));
      std::fill_n(out + (before + length) * p_.inputs, (width_ - before - length) * p_.inputs, 0.0f);
    }
  }

  void block(std::int64_t image, std::int64_t from, std::int64_t to, const float* weights, float* x) const {
    pack_rows(image, from, to, x);
    for (const Axis& rows : rows_)
      for (const Axis& columns : columns_) {
        std::vector<Tap> taps;
        for (std::size_t i = 0; i < rows.kernel.size(); ++i)
          for (std::size_t j = 0; j < columns.kernel.size(); ++j)
            taps.push_back(
                {rows.offsets[i] - top_, columns.offsets[j] - left_, rows.kernel[i] * p_.kernel_w + columns.kernel[j]});
        for (std::int64_t a = from; a < std::min(to, rows.count); ++a)
          grid_row(taps, x + (a - from) * x_step_h_ * row_,
                   p_.y + ((image * p_.y_h + rows.first + a * y_step_h_) * p_.y_w + columns.first) * p_.outputs,
                   columns.count, weights);
      }
  }

  void grid_row(const std::vector<Tap>& taps, const float* x, float* y, std::int64_t count,
                const float* weights) const {
    const std::int64_t step = x_step_w_ * p_.inputs, y_step = y_step_w_ * p_.outputs;
    for (std::int64_t o = 0; o < p_.outputs; o += kOutputs) {
      const float* const weight = weights + o * p_.kernel_h * p_.kernel_w * p_.inputs;
      std::int64_t b = 0;
      for (; b + kTiles <= count; b += kTiles)
        pixels<kTiles, kVectors>(taps, x + b * step, row_, p_.inputs, step, weight, p_.inputs, y + b * y_step + o,
                                 y_step);
      for (; b < count; ++b)
        pixels<1, kVectors>(taps, x + b * step, row_, p_.inputs, step, weight, p_.inputs, y + b * y_step + o, y_step);
    }
  }

  const ConvDirect& p_;
  const std::vector<Axis> rows_, columns_;
  const std::int64_t x_step_h_, x_step_w_, y_step_h_, y_step_w_;
  const std::int64_t top_, left_;              // the least offsets of taps, at most 0
  const std::int64_t height_, width_, row_;    // rows of x for one row of the grid; columns of x, and their values
  std::int64_t weight_size_, block_, blocks_;  // rows of the grid in a block, and the number of blocks of an image
};

}  // namespace

void conv_direct(const ConvDirect& p) {
  if (p.outputs % kLanes) throw std::invalid_argument("conv_direct: outputs must be a multiple of 16");
#if defined(__AVX512F__)
  if (p.outputs % (2 * kLanes) == 0) return Direct<8, 2>(p).run();
  Direct<16, 1>(p).run();
#else
  Direct<4, 1>(p).run();
#endif
}

}  // namespace bnkern::BNKERN_ISA
