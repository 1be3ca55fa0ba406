// moments: count, mean and M2 of a tile by a local two-pass sum with correction. The first pass brings the
// tile into the first-level cache, the second finds it there and calls for the next tile meanwhile, so that
// memory is never idle; nothing is ever raw-squared.
//
//   m = sum x / n,   d = sum (x - m),   q = sum (x - m)^2   ->   mean = m + d / n,   M2 = q - d^2 / n
//
// m is rounded, d / n says by how much: mean and M2 are then right to the last bits of a double.
#include "tiles.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class T>
void planes_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, double* mean,
                 double* m2) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const double count = static_cast<double>(tile_count(part, tile));

  V sums[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};  // four, to hide the latency of an addition
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) sums[k] = sums[k] + load(p + i + k * kLanes);
    for (; i + kLanes <= span.length; i += kLanes) sums[0] = sums[0] + load(p + i);
    if (i < span.length) sums[1] = sums[1] + load_some(p + i, static_cast<int>(span.length - i));
  });
  const A first = static_cast<A>(sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<A>(count));
  const V shift = V::all(first);

  V errors[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V squares[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  const auto add = [&](int k, V value) __attribute__((always_inline)) {
    const V delta = value - shift;
    errors[k] = errors[k] + delta;
    squares[k] = fma(delta, delta, squares[k]);
  };
  const std::int64_t next = next_tile(part, x);
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int k = 0; k < 4; ++k) {
        __builtin_prefetch(p + i + k * kLanes + next);
        add(k, load(p + i + k * kLanes));
      }
    for (; i + kLanes <= span.length; i += kLanes) add(0, load(p + i));
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      const auto present = V::Mask::from_bits(static_cast<std::uint16_t>((1 << n) - 1));
      const V delta = (load_some(p + i, n) - shift).keep(present);
      errors[1] = errors[1] + delta;
      squares[1] = fma(delta, delta, squares[1]);
    }
  });
  const double error = sum<A>((errors[0] + errors[1]) + (errors[2] + errors[3]));
  const double square = sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  *mean = first + error / count;
  *m2 = square - error * (error / count);
}

// Rows: every lane has a channel of its own, so the sums are arrays over the group's channels. Rows are taken
// four at a time: one load and store of a sum serves four values.
template <class T>
void rows_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, double* mean, double* m2) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const std::int64_t channels = tile_channels(part, group, tile), count = tile_count(part, tile);
  const std::int64_t stride = part.dense ? part.width : x.outer;
  const std::int64_t row = tile * part.rows_per_tile < part.rows ? tile * part.rows_per_tile : part.rows;
  const T* p = at<const T>(part, x, Span{row, row < part.rows ? group * part.group : 0, 0, 0, 0});

  if (row >= part.rows) {  // the leftover: one value per channel, and perhaps no whole vector
    for (std::int64_t c = 0; c < channels; ++c) mean[c] = widen(p[c]), m2[c] = 0;
    return;
  }
  A* const sums = zeroed_scratch<A>(3 * channels);
  A *const errors = sums + channels, *const squares = errors + channels;

  std::int64_t r = 0;
  for (; r + 4 <= count; r += 4, p += 4 * stride)
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const V four = (load(p + c) + load(p + stride + c)) + (load(p + 2 * stride + c) + load(p + 3 * stride + c));
      (V::load(sums + c) + four).store(sums + c);
    }
  for (; r < count; ++r, p += stride)
    for (std::int64_t c = 0; c < channels; c += kLanes) (V::load(sums + c) + load(p + c)).store(sums + c);
  const A share = A(1) / static_cast<A>(count);
  for (std::int64_t c = 0; c < channels; c += kLanes) (V::load(sums + c) * V::all(share)).store(sums + c);

  p -= count * stride;
  const std::int64_t next = next_tile(part, x);
  for (r = 0; r + 4 <= count; r += 4, p += 4 * stride)
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      for (int k = 0; k < 4; ++k) __builtin_prefetch(p + k * stride + c + next);
      const V shift = V::load(sums + c);
      const V d0 = load(p + c) - shift, d1 = load(p + stride + c) - shift;
      const V d2 = load(p + 2 * stride + c) - shift, d3 = load(p + 3 * stride + c) - shift;
      (V::load(errors + c) + ((d0 + d1) + (d2 + d3))).store(errors + c);
      const V even = fma(d2, d2, d0 * d0), odd = fma(d3, d3, d1 * d1);
      (V::load(squares + c) + (even + odd)).store(squares + c);
    }
  for (; r < count; ++r, p += stride)
    for (std::int64_t c = 0; c < channels; c += kLanes) {
      const V delta = load(p + c) - V::load(sums + c);
      (V::load(errors + c) + delta).store(errors + c);
      fma(delta, delta, V::load(squares + c)).store(squares + c);
    }
  const double exact_share = 1.0 / static_cast<double>(count);
  for (std::int64_t c = 0; c < channels; ++c) {
    const double error = errors[c];
    mean[c] = sums[c] + error * exact_share;
    m2[c] = squares[c] - error * (error * exact_share);
  }
}

}  // namespace

template <class T>
void moments_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, double* mean,
                  double* m2) {
  (part.shape.rows ? rows_tile<T> : planes_tile<T>)(part, x, group, tile, mean, m2);
}

#define BNKERN_INSTANTIATE(T) \
  template void moments_tile<T>(const Partition&, const View&, std::int64_t, std::int64_t, double*, double*);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
