// The gradient of the weight of such a convolution as conv3x3.cpp makes, and the sum of its summands' magnitudes:
// F(2 x 2, 3 x 3) once more, of x and dy or of their magnitudes.
//
// Bands are joined in chunks. Within a band a place's sums are chains of fma over its tiles, bands are added within a
// chunk, chunks in double.
#include <omp.h>

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
void gradient(const Conv3x3Gradient& p) {
  const Bands bands(p.n, p.h, p.w);
  const std::int64_t x_pitch = bands.pitch(p.inputs), dy_pitch = bands.pitch(p.outputs), zeros = p.w * p.inputs;
  const std::int64_t size = p.inputs * p.outputs;
  const std::int64_t chunks =
      std::clamp<std::int64_t>(p.n * bands.down * bands.across / kLeastTiles, 1, std::min(kMostChunks, bands.count()));
  const std::int64_t own = round_up(zeros + kPlaces * (x_pitch + dy_pitch + size), kLanes);
  const int threads = static_cast<int>(std::min<std::int64_t>(p.threads, chunks));
  const PoolSpace pool((threads * own + chunks * 9 * size) * static_cast<std::int64_t>(sizeof(float)));
  float* const partials = reinterpret_cast<float*>(pool.data());

#pragma omp parallel num_threads(threads)
  {
    float* const zero = partials + chunks * 9 * size + omp_get_thread_num() * own;
    float* const x = zero + zeros;
    float* const dy = x + kPlaces * x_pitch;
    float* const sums = dy + kPlaces * dy_pitch;
    std::memset(zero, 0, zeros * sizeof(float));
#pragma omp for schedule(dynamic)
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      std::memset(sums, 0, kPlaces * size * sizeof(float));
      for (std::int64_t band = chunk * bands.count() / chunks; band < (chunk + 1) * bands.count() / chunks; ++band) {
        const std::int64_t first = bands.first(band), last = bands.last(band);
        for (std::int64_t row = first; row < last; ++row) {
          const std::int64_t tile = (row - first) * bands.across;
          const auto input = p.absolute ? input_tiles<true> : input_tiles<false>;
          const auto gradient = p.absolute ? gradient_tiles<true> : gradient_tiles<false>;
          input(bands, row, p.x, p.inputs, zero, x + tile * p.inputs, x_pitch);
          gradient(bands, row, p.dy, p.outputs, dy + tile * p.outputs, dy_pitch);
        }
        const std::int64_t next = std::min(band + 1, bands.count() - 1);
        const RowsAhead x_ahead(bands, next, p.x, p.inputs), dy_ahead(bands, next, p.dy, p.outputs);
        for (int place = 0; place < kPlaces; ++place) {
          x_ahead.call(place), dy_ahead.call(place);
          for (std::int64_t i = 0; i < p.inputs; i += kInputs)
            for (std::int64_t o = 0; o < p.outputs; o += kVectors * kLanes)
              add_product<kInputs, kVectors>(x + place * x_pitch + i, p.inputs, dy + place * dy_pitch + o, p.outputs,
                                             (last - first) * bands.across, sums + place * size + i * p.outputs + o);
        }
      }
      to_weights(sums, size, partials + chunk * 9 * size);
    }
#pragma omp for collapse(2) schedule(static)
    for (std::int64_t i = 0; i < p.inputs; ++i)
      for (std::int64_t k = 0; k < 9; ++k)
        for (std::int64_t o = 0; o < p.outputs; o += kLanes) {
          double totals[kLanes] = {};
          for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* const from = partials + (chunk * 9 + k) * size + i * p.outputs + o;
            for (int lane = 0; lane < kLanes; ++lane) totals[lane] += static_cast<double>(from[lane]);
          }
          for (int lane = 0; lane < kLanes; ++lane)
            p.result[((o + lane) * p.inputs + i) * 9 + k] = static_cast<float>(totals[lane]);
        }
  }
}

}  // namespace

void conv3x3_gradient(const Conv3x3Gradient& p) {
  check_channels(p.inputs, p.outputs);
#if defined(__AVX512F__)
  if (p.outputs % (2 * kLanes) == 0)
    gradient<8, 2>(p);
  else
    gradient<16, 1>(p);
#else
  gradient<4, 1>(p);
#endif
}

}  // namespace bnkern::BNKERN_ISA
