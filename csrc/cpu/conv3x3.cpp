// The 3 x 3 convolution with stride 1 and padding 1 of float32 tensors in channels_last, computed with Winograd's
// F(2 x 2, 3 x 3), see winograd.h.
#include <omp.h>

#include "winograd.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

// The matrix product of one element for kTiles tiles and 16 kVectors outputs: x [tiles][inputs] by weights
// [inputs][16 kVectors]. The result is stored in y [tiles][outputs]. If kInputs is not 0 it is the number of inputs.
template <int kTiles, int kVectors, int kInputs>
BNKERN_INLINE void product(const float* x, std::int64_t any_inputs, const float* weights, float* y,
                           std::int64_t outputs) {
  const std::int64_t inputs = kInputs ? kInputs : any_inputs;
  V sums[kTiles][kVectors];
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) sums[t][q] = V::all(0);
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < inputs; ++i, weights += kVectors * kLanes) {
    V weight[kVectors];
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) weight[q] = V::load(weights + q * kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < kTiles; ++t) {
      const V value = V::all(x[t * inputs + i]);
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) sums[t][q] = fma(value, weight[q], sums[t][q]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) sums[t][q].store(y + t * outputs + q * kLanes);
}

// Computes A' m A for a row of tiles.
void output_tiles(const Bands& bands, std::int64_t row, const float* m, std::int64_t pitch, std::int64_t channels,
                  float* y) {
  const std::int64_t top = row % bands.down * 2;
  float* const first = y + (row / bands.down * bands.h + top) * bands.w * channels;
  const bool second_row = top + 1 < bands.h;
  for (std::int64_t tile = 0; tile < bands.across; ++tile) {
    const bool second = 2 * tile + 1 < bands.w;
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const float* const from = m + tile * channels + c;
      V upper[4], lower[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const V a = V::load(from + j * pitch), b = V::load(from + (4 + j) * pitch);
        const V d = V::load(from + (8 + j) * pitch), e = V::load(from + (12 + j) * pitch);
        upper[j] = a + b + d, lower[j] = b - d - e;
      }
      float* const to = first + 2 * tile * channels + c;
      (upper[0] + upper[1] + upper[2]).store(to);
      if (second) (upper[1] - upper[2] - upper[3]).store(to + channels);
      if (!second_row) continue;
      (lower[0] + lower[1] + lower[2]).store(to + bands.w * channels);
      if (second) (lower[1] - lower[2] - lower[3]).store(to + (bands.w + 1) * channels);
    }
  }
}

// Computes G g G' for 16 outputs and one input, and stores its elements at `out`, each `pitch` after the previous one.
void weight_tile(const Conv3x3& p, std::int64_t output, std::int64_t input, float* out, std::int64_t pitch) {
  float g[9][kLanes];
  for (int k = 0; k < 9; ++k) {
    const float* const from =
        p.weight + k / 3 * p.weight_h + k % 3 * p.weight_w + output * p.weight_output + input * p.weight_input;
    for (int i = 0; i < kLanes; ++i) g[k][i] = from[i * p.weight_output];
  }
  const auto times_g = [](V a, V b, V c, V* to) {
    const V outer = V::all(0.5f) * (a + c), inner = V::all(0.5f) * b;
    to[0] = a, to[1] = outer + inner, to[2] = outer - inner, to[3] = c;
  };
  V columns[3][4];
  for (int k = 0; k < 3; ++k) times_g(V::load(g[k]), V::load(g[3 + k]), V::load(g[6 + k]), columns[k]);
  for (int i = 0; i < 4; ++i) {
    V row[4];
    times_g(columns[0][i], columns[1][i], columns[2][i], row);
    for (int j = 0; j < 4; ++j) row[j].store(out + (4 * i + j) * pitch);
  }
}

template <int kTiles, int kVectors, int kInputs>
void convolve(const Conv3x3& p) {
  constexpr std::int64_t kOutputs = kVectors * kLanes;  // outputs of one product
  const Bands bands(p.n, p.h, p.w);
  const std::int64_t x_pitch = bands.pitch(p.inputs), m_pitch = bands.pitch(p.outputs), zeros = p.w * p.inputs;
  const std::int64_t thread_size = round_up(kElements * (x_pitch + m_pitch) + zeros, kLanes);
  const std::int64_t weight_size = kElements * p.inputs * p.outputs, w_pitch = p.inputs * p.outputs;
  const int threads = static_cast<int>(std::min<std::int64_t>(p.threads, bands.count()));
  // A product reads whole rows before it writes rows. If both have the same length, x and m share one buffer, which
  // takes half as much cache.
  const bool in_place = kInputs == kOutputs && p.outputs == kOutputs;
  const PoolSpace pool((weight_size + threads * thread_size) * static_cast<std::int64_t>(sizeof(float)));
  float* const weights = reinterpret_cast<float*>(pool.data());  // [element][outputs / kOutputs][input][kOutputs]

#pragma omp parallel num_threads(threads)
  {
    float* const zero = weights + weight_size + omp_get_thread_num() * thread_size;
    float* const x = zero + zeros;
    float* const m = in_place ? x : x + kElements * x_pitch;
    std::memset(zero, 0, thread_size * sizeof(float));  // tiles that fill up a group stay zero
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < p.inputs; ++i)
      for (std::int64_t o = 0; o < p.outputs; o += kLanes)
        weight_tile(p, o, i, weights + o / kOutputs * kOutputs * p.inputs + i * kOutputs + o % kOutputs, w_pitch);
#pragma omp for schedule(static)
    for (std::int64_t band = 0; band < bands.count(); ++band) {
      const std::int64_t first = bands.first(band), last = bands.last(band);
      const std::int64_t tiles = round_up((last - first) * bands.across, kTiles);
      for (std::int64_t row = first; row < last; ++row)
        input_tiles<false>(bands, row, p.x, p.inputs, zero, x + (row - first) * bands.across * p.inputs, x_pitch);
      const BandPrefetch next_x(bands, std::min(band + 1, bands.count() - 1), p.x, p.inputs);
      const BandPrefetch y(bands, band, p.y, p.outputs);
      for (int element = 0; element < kElements; ++element) {
        next_x.prefetch(element), y.prefetch(element);
        for (std::int64_t o = 0; o < p.outputs; o += kOutputs)
          for (std::int64_t t = 0; t < tiles; t += kTiles)
            product<kTiles, kVectors, kInputs>(x + element * x_pitch + t * p.inputs, p.inputs,
                                               weights + element * w_pitch + o * p.inputs,
                                               m + element * m_pitch + t * p.outputs + o, p.outputs);
      }
      for (std::int64_t row = first; row < last; ++row)
        output_tiles(bands, row, m + (row - first) * bands.across * p.outputs, m_pitch, p.outputs, p.y);
    }
  }
}

template <int kTiles, int kVectors>
void convolve_from(const Conv3x3& p) {
  switch (p.inputs) {
    case 16:
      return convolve<kTiles, kVectors, 16>(p);
    case 32:
      return convolve<kTiles, kVectors, 32>(p);
    case 64:
      return convolve<kTiles, kVectors, 64>(p);
  }
  convolve<kTiles, kVectors, 0>(p);
}

}  // namespace

void conv3x3(const Conv3x3& p) {
  check_channels(p.inputs, p.outputs);
#if defined(__AVX512F__)
  if (p.outputs % (2 * kLanes) == 0)
    convolve_from<8, 2>(p);
  else
    convolve_from<16, 1>(p);
#else
  convolve_from<4, 1>(p);
#endif
}

}  // namespace bnkern::BNKERN_ISA
