// The weight gradient of the convolution of conv3x3.cpp, and the sum of the magnitudes of its summands. Both use
// F(2 x 2, 3 x 3), for x and dy or for their magnitudes.
//
// Within a band each sum is a chain of fma over the tiles. The sums of bands are added within a chunk, and those of
// chunks in double.
#include "winograd.h"

namespace bnkern::BNKERN_ISA {
namespace {

using V = Vec<float>;

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
void gradient_tiles(const Bands& bands, std::int64_t row, ImageRows dy, std::int64_t channels, float* out,
                    std::int64_t pitch) {
  const std::int64_t top = row % bands.down * 2, dy_row = bands.w * channels;
  const float* const first = dy.data + (bands.image_row(row) - dy.first) * dy_row;
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
class Gradient3x3 final : public RowGradient {
 public:
  Gradient3x3(const Strips& strips, std::int64_t inputs, std::int64_t outputs, bool absolute)
      : bands_(strips.bands),
        inputs_(inputs),
        outputs_(outputs),
        size_(inputs * outputs),
        x_pitch_(bands_.pitch(inputs)),
        dy_pitch_(bands_.pitch(outputs)),
        zeros_(round_up(bands_.w * inputs, kLanes)),
        chunks_(strips.chunks()),
        absolute_(absolute),
        pool_(chunks_ * 9 * size_ * static_cast<std::int64_t>(sizeof(float))),
        partials_(reinterpret_cast<float*>(pool_.data())) {}

  std::int64_t scratch() const override { return zeros_ + kElements * (x_pitch_ + dy_pitch_ + size_); }

  void begin(float* scratch) const override {
    std::memset(scratch, 0, zeros_ * sizeof(float));
    std::memset(sums_in(scratch), 0, kElements * size_ * sizeof(float));
  }

  void add(std::int64_t first, std::int64_t last, ImageRows x, ImageRows dy, float* scratch,
           Ahead* ahead) const override {
    float* const zero = scratch;
    float* const x_tiles = zero + zeros_;
    float* const dy_tiles = x_tiles + kElements * x_pitch_;
    float* const sums = sums_in(scratch);
    if (ahead) ahead->divide(divide_up(last - first, bands_.rows) * kElements);
    for (std::int64_t begin = first; begin < last; begin += bands_.rows) {
      const std::int64_t end = std::min(begin + bands_.rows, last), next = std::min(end + bands_.rows, last);
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t tile = (row - begin) * bands_.across;
        const auto input = absolute_ ? input_tiles<true> : input_tiles<false>;
        const auto gradient = absolute_ ? gradient_tiles<true> : gradient_tiles<false>;
        input(bands_, row, x, inputs_, zero, x_tiles + tile * inputs_, x_pitch_);
        gradient(bands_, row, dy, outputs_, dy_tiles + tile * outputs_, dy_pitch_);
      }
      const BandPrefetch next_x(bands_, end, next, x, inputs_), next_dy(bands_, end, next, dy, outputs_);
      for (int element = 0; element < kElements; ++element) {
        if (ahead)
          ahead->prefetch();
        else
          next_x.prefetch(element), next_dy.prefetch(element);
        for (std::int64_t i = 0; i < inputs_; i += kInputs)
          for (std::int64_t o = 0; o < outputs_; o += kVectors * kLanes)
            add_product<kInputs, kVectors>(x_tiles + element * x_pitch_ + i, inputs_,
                                           dy_tiles + element * dy_pitch_ + o, outputs_, (end - begin) * bands_.across,
                                           sums + element * size_ + i * outputs_ + o);
      }
    }
  }

  void end(std::int64_t chunk, float* scratch) override {
    to_weights(sums_in(scratch), size_, partials_ + chunk * 9 * size_);
  }

  void join(float* result) const override {
#pragma omp for collapse(2) schedule(static) nowait
    for (std::int64_t i = 0; i < inputs_; ++i)
      for (std::int64_t k = 0; k < 9; ++k)
        for (std::int64_t o = 0; o < outputs_; o += kLanes) {
          double totals[kLanes] = {};
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
            const float* const from = partials_ + (chunk * 9 + k) * size_ + i * outputs_ + o;
            for (int lane = 0; lane < kLanes; ++lane) totals[lane] += static_cast<double>(from[lane]);
          }
          for (int lane = 0; lane < kLanes; ++lane)
            result[((o + lane) * inputs_ + i) * 9 + k] = static_cast<float>(totals[lane]);
        }
  }

 private:
  float* sums_in(float* scratch) const { return scratch + zeros_ + kElements * (x_pitch_ + dy_pitch_); }

  const Bands bands_;
  const std::int64_t inputs_, outputs_, size_, x_pitch_, dy_pitch_, zeros_, chunks_;
  const bool absolute_;
  const PoolSpace pool_;
  float* const partials_;  // [chunk][tap of the kernel][input][output]
};

// The sums of conv_grad_signs.
class Gradient3x3Summation final : public Summation {
 public:
  Gradient3x3Summation(const ConvGradSigns& p, bool absolute)
      : p_(p),
        result_(static_cast<float*>(absolute ? p.abs_sum : p.sum)),
        strips_(Bands(p.x.n, p.x.h, p.x.w), p.x.c),
        gradient_(row_gradient(strips_, p.x.c, p.dy.c, absolute)) {}

  std::int64_t tasks() const override { return strips_.chunks(); }
  std::int64_t scratch_bytes() const override {
    return gradient_->scratch() * static_cast<std::int64_t>(sizeof(float));
  }
  void run(std::int64_t chunk, char* scratch) override {
    float* const space = reinterpret_cast<float*>(scratch);
    const auto rows_of = [](const Image& image) { return ImageRows{static_cast<const float*>(image.data), 0}; };
    gradient_->begin(space);
    for (std::int64_t strip = strips_.of_chunk(chunk); strip < strips_.of_chunk(chunk + 1); ++strip)
      gradient_->add(strips_.first(strip), strips_.first(strip + 1), rows_of(p_.x), rows_of(p_.dy), space, nullptr);
    gradient_->end(chunk, space);
  }
  void join() override { gradient_->join(result_); }

 private:
  const ConvGradSigns p_;
  float* const result_;
  const Strips strips_;
  const std::unique_ptr<RowGradient> gradient_;
};

}  // namespace

std::unique_ptr<RowGradient> row_gradient(const Strips& strips, std::int64_t inputs, std::int64_t outputs,
                                          bool absolute) {
  check_channels(inputs, outputs);
#if defined(__AVX512F__)
  if (outputs % (2 * kLanes) == 0) return std::make_unique<Gradient3x3<8, 2>>(strips, inputs, outputs, absolute);
  return std::make_unique<Gradient3x3<16, 1>>(strips, inputs, outputs, absolute);
#else
  return std::make_unique<Gradient3x3<4, 1>>(strips, inputs, outputs, absolute);
#endif
}

std::unique_ptr<Summation> conv3x3_gradient(const ConvGradSigns& p, bool absolute) {
  for (const std::int64_t value : {p.stride_h, p.stride_w, p.padding_h, p.padding_w, p.kernel_h - 2, p.kernel_w - 2})
    if (value != 1) throw std::invalid_argument("conv3x3: the kernel must be 3 x 3, stride and padding 1");
  for (const Image* t : {&p.x, &p.dy}) {
    const bool dense = t->stride_c == 1 && (t->w == 1 || t->stride_w == t->c) &&
                       (t->h == 1 || t->stride_h == t->w * t->c) && (t->n == 1 || t->stride_n == t->h * t->w * t->c);
    if (p.dtype != DType::kFloat32 || !dense)
      throw std::invalid_argument("conv3x3: tensors must be float32, dense in channels_last");
  }
  return std::make_unique<Gradient3x3Summation>(p, absolute);
}

}  // namespace bnkern::BNKERN_ISA
