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

// Computes A' m A for a row of tiles, plus the addend if kAdds.
template <bool kAdds>
void output_tiles(const Bands& bands, std::int64_t row, const float* m, std::int64_t pitch, std::int64_t channels,
                  const float* addend, float* y) {
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
      const auto store = [&](V value, std::int64_t offset) {
        (kAdds ? value + V::load(addend + (to - y) + offset) : value).store(to + offset);
      };
      store(upper[0] + upper[1] + upper[2], 0);
      if (second) store(upper[1] - upper[2] - upper[3], channels);
      if (!second_row) continue;
      store(lower[0] + lower[1] + lower[2], bands.w * channels);
      if (second) store(lower[1] - lower[2] - lower[3], (bands.w + 1) * channels);
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
class Convolution final : public RowConvolution {
 public:
  Convolution(const Conv3x3& p, const float* addend)
      : p_(p),
        addend_(addend),
        bands_(p.n, p.h, p.w),
        x_pitch_(bands_.pitch(p.inputs)),
        m_pitch_(bands_.pitch(p.outputs)),
        w_pitch_(p.inputs * p.outputs),
        zeros_(p.w * p.inputs),
        pool_(kElements * w_pitch_ * static_cast<std::int64_t>(sizeof(float))),
        weights_(reinterpret_cast<float*>(pool_.data())) {}

  std::int64_t scratch() const override { return round_up(kElements * (x_pitch_ + m_pitch_) + zeros_, kLanes); }

  void prepare(float* scratch) override {
    std::memset(scratch, 0, this->scratch() * sizeof(float));  // tiles that fill up a group stay zero
#pragma omp for schedule(static)
    for (std::int64_t i = 0; i < p_.inputs; ++i)
      for (std::int64_t o = 0; o < p_.outputs; o += kLanes)
        weight_tile(p_, o, i, weights_ + o / kOutputs * kOutputs * p_.inputs + i * kOutputs + o % kOutputs, w_pitch_);
  }

  void run(std::int64_t first, std::int64_t last, ImageRows x, float* scratch, Ahead* ahead) const override {
    float* const zero = scratch;
    float* const x_tiles = zero + zeros_;
    // A product reads whole rows before it writes rows. If both have the same length, x and m share one buffer, which
    // takes half as much cache.
    const bool in_place = kInputs == kOutputs && p_.outputs == kOutputs;
    float* const m = in_place ? x_tiles : x_tiles + kElements * x_pitch_;
    if (ahead) ahead->divide(divide_up(last - first, bands_.rows) * kElements);
    for (std::int64_t begin = first; begin < last; begin += bands_.rows) {
      const std::int64_t end = std::min(begin + bands_.rows, last), next = std::min(end + bands_.rows, last);
      const std::int64_t tiles = round_up((end - begin) * bands_.across, kTiles);
      for (std::int64_t row = begin; row < end; ++row)
        input_tiles<false>(bands_, row, x, p_.inputs, zero, x_tiles + (row - begin) * bands_.across * p_.inputs,
                           x_pitch_);
      const BandPrefetch next_x(bands_, end, next, x, p_.inputs);
      const BandPrefetch y(bands_, begin, end, ImageRows{p_.y, 0}, p_.outputs);
      for (int element = 0; element < kElements; ++element) {
        ahead ? ahead->prefetch() : next_x.prefetch(element);
        y.prefetch(element);
        for (std::int64_t o = 0; o < p_.outputs; o += kOutputs)
          for (std::int64_t t = 0; t < tiles; t += kTiles)
            product<kTiles, kVectors, kInputs>(x_tiles + element * x_pitch_ + t * p_.inputs, p_.inputs,
                                               weights_ + element * w_pitch_ + o * p_.inputs,
                                               m + element * m_pitch_ + t * p_.outputs + o, p_.outputs);
      }
      const auto output = addend_ ? output_tiles<true> : output_tiles<false>;
      for (std::int64_t row = begin; row < end; ++row)
        output(bands_, row, m + (row - begin) * bands_.across * p_.outputs, m_pitch_, p_.outputs, addend_, p_.y);
    }
  }

 private:
  static constexpr std::int64_t kOutputs = kVectors * kLanes;  // outputs of one product
  const Conv3x3 p_;
  const float* const addend_;
  const Bands bands_;
  const std::int64_t x_pitch_, m_pitch_, w_pitch_, zeros_;
  const PoolSpace pool_;
  float* const weights_;  // [element][outputs / kOutputs][input][kOutputs]
};

template <int kTiles, int kVectors>
std::unique_ptr<RowConvolution> convolution(const Conv3x3& p, const float* addend) {
  switch (p.inputs) {
    case 16:
      return std::make_unique<Convolution<kTiles, kVectors, 16>>(p, addend);
    case 32:
      return std::make_unique<Convolution<kTiles, kVectors, 32>>(p, addend);
    case 64:
      return std::make_unique<Convolution<kTiles, kVectors, 64>>(p, addend);
  }
  return std::make_unique<Convolution<kTiles, kVectors, 0>>(p, addend);
}

}  // namespace

std::unique_ptr<RowConvolution> row_convolution(const Conv3x3& p, const float* addend) {
  check_channels(p.inputs, p.outputs);
#if defined(__AVX512F__)
  if (p.outputs % (2 * kLanes) == 0) return convolution<8, 2>(p, addend);
  return convolution<16, 1>(p, addend);
#else
  return convolution<4, 1>(p, addend);
#endif
}

void conv3x3(const Conv3x3& p) {
  const Bands bands(p.n, p.h, p.w);
  const auto convolution = row_convolution(p);
  const std::int64_t scratch = convolution->scratch();
  const int threads = static_cast<int>(std::min<std::int64_t>(p.threads, bands.count()));
  const PoolSpace pool(threads * scratch * static_cast<std::int64_t>(sizeof(float)));
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    float* const space = reinterpret_cast<float*>(pool.data()) + thread * scratch;
    convolution->prepare(space);
    const std::int64_t first = bands.first(thread * bands.count() / team);
    convolution->run(first, bands.first((thread + 1) * bands.count() / team), ImageRows{p.x, 0}, space, nullptr);
  }
}

}  // namespace bnkern::BNKERN_ISA
