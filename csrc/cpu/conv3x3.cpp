// The 3 x 3 convolution of stride 1 and padding 1, channels_last, float32, as a direct one: a few neighbouring outputs
// of a row, 16 or 32 channels of each, stay in registers while all of x that they meet passes by. Each output is one
// chain of fma, in an order that depends on shapes alone.
//
// x goes through a padded copy of one image at a time, so that no output is a special case; weights are packed so that
// they are read in order.
#include <omp.h>

#include <cstring>

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

// y[p][16 q ...] for kPlaces neighbouring outputs p of a row and kVectors vectors q of channels: x points at the padded
// image's first row and column that they meet, weights are [3][3 * kInputs][16 * kVectors].
template <int kInputs, int kPlaces, int kVectors>
BNKERN_INLINE void outputs_of(const float* x, std::int64_t x_row, const float* weights, float* y,
                              std::int64_t y_place) {
  V sums[kPlaces][kVectors];
#pragma GCC unroll 16
  for (int p = 0; p < kPlaces; ++p)
#pragma GCC unroll 2
    for (int q = 0; q < kVectors; ++q) sums[p][q] = V::all(0);
  for (int row = 0; row < 3; ++row, x += x_row) {
    const float* next = x;
#pragma GCC unroll 4
    for (int k = 0; k < 3 * kInputs; ++k, ++next, weights += kVectors * kLanes) {
      V weight[kVectors];
#pragma GCC unroll 2
      for (int q = 0; q < kVectors; ++q) weight[q] = V::load(weights + q * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) {
        const V value = V::all(next[p * kInputs]);
#pragma GCC unroll 2
        for (int q = 0; q < kVectors; ++q) sums[p][q] = fma(value, weight[q], sums[p][q]);
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPlaces; ++p)
#pragma GCC unroll 2
    for (int q = 0; q < kVectors; ++q) sums[p][q].store(y + p * y_place + q * kLanes);
}

template <int kInputs, int kPlaces, int kVectors>
void convolve(const Conv3x3& p) {
  constexpr int kOutputs = kVectors * kLanes;  // at a time
  const std::int64_t x_row = (p.w + 2) * kInputs, group = 9 * kInputs * kOutputs;
  const std::int64_t padded = round_up((p.h + 2) * x_row, kLanes);
  const int threads = static_cast<int>(std::min<std::int64_t>(p.threads, p.n));
  const PoolSpace pool((9 * kInputs * p.outputs + threads * padded) * static_cast<std::int64_t>(sizeof(float)));
  float* const weights = reinterpret_cast<float*>(pool.data());
  float* const images = weights + 9 * kInputs * p.outputs;

#pragma omp parallel num_threads(threads)
  {
    float* const image = images + omp_get_thread_num() * padded;
    std::memset(image, 0, padded * sizeof(float));
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < 9 * kInputs; ++k) {
      const float* const from =
          p.weight + k / (3 * kInputs) * p.weight_h + k / kInputs % 3 * p.weight_w + k % kInputs * p.weight_input;
      for (std::int64_t o = 0; o < p.outputs; ++o)
        weights[o / kOutputs * group + k * kOutputs + o % kOutputs] = from[o * p.weight_output];
    }
#pragma omp for schedule(static)
    for (std::int64_t n = 0; n < p.n; ++n) {
      const float* const x = p.x + n * p.h * p.w * kInputs;
      float* const y = p.y + n * p.h * p.w * p.outputs;
      for (std::int64_t h = 0; h < p.h; ++h)
        std::memcpy(image + (h + 1) * x_row + kInputs, x + h * p.w * kInputs, p.w * kInputs * sizeof(float));
      for (std::int64_t o = 0; o < p.outputs; o += kOutputs)
        for (std::int64_t h = 0; h < p.h; ++h)
          for (std::int64_t w = 0; w < p.w; w += kPlaces)
            outputs_of<kInputs, kPlaces, kVectors>(image + h * x_row + w * kInputs, x_row,
                                                   weights + o / kOutputs * group, y + (h * p.w + w) * p.outputs + o,
                                                   p.outputs);
    }
  }
}

template <int kInputs>
bool convolve_from(const Conv3x3& p) {
  if (p.outputs % 32 == 0 && p.w % 8 == 0) return convolve<kInputs, 8, 2>(p), true;
  if (p.outputs % 16 == 0 && p.w % 16 == 0) return convolve<kInputs, 16, 1>(p), true;
  return false;
}

}  // namespace

bool conv3x3(const Conv3x3& p) {
  switch (p.inputs) {
    case 16:
      return convolve_from<16>(p);
    case 32:
      return convolve_from<32>(p);
    case 64:
      return convolve_from<64>(p);
  }
  return false;
}

}  // namespace bnkern::BNKERN_ISA
