// The gradient of the weight of such a convolution as conv3x3.cpp makes, and the sum of its summands' magnitudes:
// F(2 x 2, 3 x 3) once more, of x and dy or of their magnitudes.
//
// Bands are joined in chunks. Within a band a place's sums are chains of fma over its tiles, bands are added within a
// chunk, chunks in double.
#include "winograd.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

constexpr std::int64_t kLeastTiles = 256;  // of a chunk

// A dy A' of a tile, of which only the left column or the upper row may be there. The last column and row of A have
// their signs turned, which to_weights makes up for.
template <bool kAbsolute>
BNKERN_INLINE void gradient_tile(const float* dy, std::int64_t column, std::int64_t row, bool right, bool lower,
                                 float* out, std::int64_t pitch) {
  const auto at = [&](bool there, std::int64_t offset) {
    const V value = there ? V::load(dy + offset) : V::all(0);
    return kAbsolute ? magnitude(value) : value;
  };
  const V a = at(true, 0), b = at(right, column), d = at(lower, row), e = at(right && lower, row + column);
  const auto store = [&](int k, V left, V right) {
    left.store(out + 4 * k * pitch), (left + right).store(out + (4 * k + 1) * pitch);
    (left - right).store(out + (4 * k + 2) * pitch), right.store(out + (4 * k + 3) * pitch);
  };
  store(0, a, b), store(1, a + d, b + e), store(2, a - d, b - e), store(3, d, e);
}

// The same of a row of tiles.
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

// Inputs by tiles times tiles by outputs, of one place, added to sums [inputs][outputs].
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

// G' s G of all sums of a chunk: to partial [9][inputs][outputs].
void to_weights(const float* sums, std::int64_t size, float* partial) {
  const auto gather = [](V a, V b, V c, V d, V* to) {
    const V inner = V::all(0.5f) * (b + c);
    to[0] = a + inner, to[1] = V::all(0.5f) * (b - c), to[2] = inner - d;
  };
  for (std::int64_t k = 0; k < size; k += kLanes) {
    V rows[4][3];
    for (int i = 0; i < 4; ++i) {
      const float* const from = sums + 4 * i * size + k;
      gather(V::load(from), V::load(from + size), V::load(from + 2 * size), V::load(from + 3 * size), rows[i]);
    }
    for (int j = 0; j < 3; ++j) {
      V column[3];
      gather(rows[0][j], rows[1][j], rows[2][j], rows[3][j], column);
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
    return (zeros() + kPlaces * (bands_.pitch(p_.x.c) + bands_.pitch(p_.dy.c) + size_)) *
           static_cast<std::int64_t>(sizeof(float));
  }

  void run(std::int64_t chunk, char* scratch) override {
    const std::int64_t inputs = p_.x.c, outputs = p_.dy.c;
    const std::int64_t x_pitch = bands_.pitch(inputs), dy_pitch = bands_.pitch(outputs);
    const float *const x = static_cast<const float*>(p_.x.data), *const dy = static_cast<const float*>(p_.dy.data);
    float* const zero = reinterpret_cast<float*>(scratch);
    float* const x_tiles = zero + zeros();
    float* const dy_tiles = x_tiles + kPlaces * x_pitch;
    float* const sums = dy_tiles + kPlaces * dy_pitch;
    std::memset(zero, 0, zeros() * sizeof(float));
    std::memset(sums, 0, kPlaces * size_ * sizeof(float));
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
      const RowsAhead x_ahead(bands_, next, x, inputs), dy_ahead(bands_, next, dy, outputs);
      for (int place = 0; place < kPlaces; ++place) {
        x_ahead.call(place), dy_ahead.call(place);
        for (std::int64_t i = 0; i < inputs; i += kInputs)
          for (std::int64_t o = 0; o < outputs; o += kVectors * kLanes)
            add_product<kInputs, kVectors>(x_tiles + place * x_pitch + i, inputs, dy_tiles + place * dy_pitch + o,
                                           outputs, (last - first) * bands_.across,
                                           sums + place * size_ + i * outputs + o);
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
  float* const partials_;  // [chunk][place of the kernel][input][output]
};

}  // namespace

std::unique_ptr<Summation> conv3x3_gradient(const ConvGradSigns& p, bool absolute) {
  check_channels(p.x.c, p.dy.c);
  for (const std::int64_t one : {p.stride_h, p.stride_w, p.padding_h, p.padding_w, p.kernel_h - 2, p.kernel_w - 2})
    if (one != 1) throw std::invalid_argument("conv3x3: the kernel must be 3 x 3, stride and padding 1");
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
