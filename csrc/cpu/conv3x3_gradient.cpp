// The weight gradient of the convolution of conv3x3.cpp, and the sum of the magnitudes of its summands. Both use
// F(2 x 2, 3 x 3), for x and dy or for their magnitudes.
//
// A chunk is a sequence of bands. Within a band each sum is a chain of fma over the tiles. The sums of bands are added
// within a chunk, and those of chunks in double.
#include "winograd.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

constexpr std::int64_t kLeastTiles = 256;  // the least number of tiles in a chunk

// Computes A dy A' for a tile. Its right column and its lower row may be outside of the image. The last row and column
// of the result are stored with the opposite sign, which to_weights corrects.
template <bool kAbsolute>
BNKERN_INLINE void gradient_tile(const float* dy, std::int64_t column, std::int64_t row, bool right, bool lower,
                                 float* out, std::int64_t pitch) {
  const auto load = [&](bool exists, std::int64_t offset) {
    const V value = exists ? V::load(dy + offset) : V::all(0);
    return kAbsolute ? magnitude(value) : value;
  };
  const V a = load(true, 0), b = load(right, column), d = load(lower, row), e = load(right && lower, row + column);
  const auto store = [&](int k, V left, V right) {
    left.store(out + 4 * k * pitch), (left + right).store(out + (4 * k + 1) * pitch);
    (left - right).store(out + (4 * k + 2) * pitch), right.store(out + (4 * k + 3) * pitch);
  };
  store(0, a, b), store(1, a + d, b + e), store(2, a - d, b - e), store(3, d, e);
}

// The same for a row of tiles.
template <bool kAbsolute>
void gradient_tiles(const Bands& bands, std::int64_t row, const float* dy, std::int64_t channels, float* out,
                    std::int64_t pitch) {
  const std::int64_t top = row % bands.down * 2, dy_row = bands.w * channels;
  const float* const first = dy + (row / bands.down * bands.h + top) * dy_row;
  const bool lower = top + 1 < bands.h;
  for (std::int64_t tile = 0; tile < bands.across; ++tile)
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const float* const from = first + 2 * tile * channels + c;
      float* const to = out + tile * channels + c;
      if (const bool right = 2 * tile + 1 < bands.w; right && lower)
        gradient_tile<kAbsolute>(from, channels, dy_row, true, true, to, pitch);
      else
        gradient_tile<kAbsolute>(from, channels, dy_row, right, lower, to, pitch);
    }
}

// Adds the matrix product of one element, inputs by tiles times tiles by outputs, to sums [inputs][outputs].
template <int kInputs, int kVectors>
BNKERN_INLINE void add_product(const float* x, std::int64_t inputs, const float* dy, std::int64_t outputs,
                               std::int64_t tiles, float* to) {
  V sums[kInputs][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) sums[i][q] = V::all(0);
  for (std::int64_t t = 0; t < tiles; ++t, x += inputs, dy += outputs) {
    V gradient[kVectors];
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) gradient[q] = V::load(dy + q * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kInputs; ++i) {
      const V value = V::all(x[i]);
#pragma GCC unroll 4
      for (int q = 0; q < kVectors; ++q) sums[i][q] = fma(value, gradient[q], sums[i][q]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kInputs; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < kVectors; ++q) {
      float* const out = to + i * outputs + q * kLanes;
      (V::load(out) + sums[i][q]).store(out);
    }
}

// Computes G' s G for all sums of a chunk, and stores it in partial [9][inputs][outputs].
void to_weights(const float* sums, std::int64_t size, float* partial) {
  const auto times_g = [](V a, V b, V c, V d, V* to) {
    const V inner = V::all(0.5f) * (b + c);
    to[0] = a + inner, to[1] = V::all(0.5f) * (b - c), to[2] = inner - d;
  };
  for (std::int64_t k = 0; k < size; k += kLanes) {
    V rows[4][3];
    for (int i = 0; i < 4; ++i) {
      const float* const from = sums + 4 * i * size + k;
      times_g(V::load(from), V::load(from + size), V::load(from + 2 * size), V::load(from + 3 * size), rows[i]);
    }
    for (int j = 0; j < 3; ++j) {
      V column[3];
      times_g(rows[0][j], rows[1][j], rows[2][j], rows[3][j], column);
      for (int i = 0; i < 3; ++i) column[i].store(partial + (3 * i + j) * size + k);
    }
  }
}

template <int kInputs, int kVectors>
class Conv3x3Gradient final : public Summation {
 public:
  Conv3x3Gradient(const ConvGradSigns& p, bool absolute)
      : p_(p),
        absolute_(absolute),
        bands_(p.x.n, p.x.h, p.x.w),
        size_(p.x.c * p.dy.c),
        chunks_(std::clamp<std::int64_t>(p.x.n * bands_.down * bands_.across / kLeastTiles, 1,
                                         std::min(kMostChunks, bands_.count()))),
        pool_(chunks_ * 9 * size_ * static_cast<std::int64_t>(sizeof(float))),
        partials_(reinterpret_cast<float*>(pool_.data())) {}

  std::int64_t tasks() const override { return chunks_; }

  std::int64_t scratch_bytes() const override {
    return (zeros() + kElements * (bands_.pitch(p_.x.c) + bands_.pitch(p_.dy.c) + size_)) *
           static_cast<std::int64_t>(sizeof(float));
  }

  void run(std::int64_t chunk, char* scratch) override {
    const std::int64_t inputs = p_.x.c, outputs = p_.dy.c;
    const std::int64_t x_pitch = bands_.pitch(inputs), dy_pitch = bands_.pitch(outputs);
    const float *const x = static_cast<const float*>(p_.x.data), *const dy = static_cast<const float*>(p_.dy.data);
    float* const zero = reinterpret_cast<float*>(scratch);
    float* const x_tiles = zero + zeros();
    float* const dy_tiles = x_tiles + kElements * x_pitch;
    float* const sums = dy_tiles + kElements * dy_pitch;
    std::memset(zero, 0, zeros() * sizeof(float));
    std::memset(sums, 0, kElements * size_ * sizeof(float));
    const std::int64_t end = (chunk + 1) * bands_.count() / chunks_;
    for (std::int64_t band = chunk * bands_.count() / chunks_; band < end; ++band) {
      const std::int64_t first = bands_.first(band), last = bands_.last(band);
      for (std::int64_t row = first; row < last; ++row) {
        const std::int64_t tile = (row - first) * bands_.across;
        const auto input = absolute_ ? input_tiles<true> : input_tiles<false>;
        const auto gradient = absolute_ ? gradient_tiles<true> : gradient_tiles<false>;
        input(bands_, row, x, inputs, zero, x_tiles + tile * inputs, x_pitch);
        gradient(bands_, row, dy, outputs, dy_tiles + tile * outputs, dy_pitch);
      }
      const std::int64_t next = std::min(band + 1, bands_.count() - 1);
      const BandPrefetch next_x(bands_, next, x, inputs), next_dy(bands_, next, dy, outputs);
      for (int element = 0; element < kElements; ++element) {
        next_x.prefetch(element), next_dy.prefetch(element);
        for (std::int64_t i = 0; i < inputs; i += kInputs)
          for (std::int64_t o = 0; o < outputs; o += kVectors * kLanes)
            add_product<kInputs, kVectors>(x_tiles + element * x_pitch + i, inputs, dy_tiles + element * dy_pitch + o,
                                           outputs, (last - first) * bands_.across,
                                           sums + element * size_ + i * outputs + o);
      }
    }
    to_weights(sums, size_, partials_ + chunk * 9 * size_);
  }

  void join() override {
    float* const result = static_cast<float*>(absolute_ ? p_.abs_sum : p_.sum);
#pragma omp for collapse(2) schedule(static) nowait
    for (std::int64_t i = 0; i < p_.x.c; ++i)
      for (std::int64_t k = 0; k < 9; ++k)
        for (std::int64_t o = 0; o < p_.dy.c; o += kLanes) {
          double totals[kLanes] = {};
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const float* const from = partials_ + (chunk * 9 + k) * size_ + i * p_.dy.c + o;
            for (int lane = 0; lane < kLanes; ++lane) totals[lane] += static_cast<double>(from[lane]);
          }
          for (int lane = 0; lane < kLanes; ++lane)
            result[((o + lane) * p_.x.c + i) * 9 + k] = static_cast<float>(totals[lane]);
        }
  }

 private:
  std::int64_t zeros() const { return round_up(p_.x.w * p_.x.c, kLanes); }

  const ConvGradSigns p_;
  const bool absolute_;
  const Bands bands_;
  const std::int64_t size_, chunks_;
  const PoolSpace pool_;
  float* const partials_;  // [chunk][tap of the kernel][input][output]
};

}  // namespace

std::unique_ptr<Summation> conv3x3_gradient(const ConvGradSigns& p, bool absolute) {
  check_channels(p.x.c, p.dy.c);
  for (const std::int64_t value : {p.stride_h, p.stride_w, p.padding_h, p.padding_w, p.kernel_h - 2, p.kernel_w - 2})
    if (value != 1) throw std::invalid_argument("conv3x3: the kernel must be 3 x 3, stride and padding 1");
  for (const Image* t : {&p.x, &p.dy}) {
    const bool dense = t->stride_c == 1 && (t->w == 1 || t->stride_w == t->c) &&
                       (t->h == 1 || t->stride_h == t->w * t->c) && (t->n == 1 || t->stride_n == t->h * t->w * t->c);
    if (p.dtype != DType::kFloat32 || !dense)
      throw std::invalid_argument("conv3x3: tensors must be float32, dense in channels_last");
  }
#if defined(__AVX512F__)
  if (p.dy.c % (2 * kLanes) == 0) return std::make_unique<Conv3x3Gradient<8, 2>>(p, absolute);
  return std::make_unique<Conv3x3Gradient<16, 1>>(p, absolute);
#else
  return std::make_unique<Conv3x3Gradient<4, 1>>(p, absolute);
#endif
}

}  // namespace bnkern::BNKERN_ISA
