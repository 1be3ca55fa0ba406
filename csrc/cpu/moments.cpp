// moments: count, mean and M2 of a tile by a local two-pass sum with correction. The first pass brings the tile into a
// cache, the second finds it there and calls for the next tile meanwhile, so that memory is never idle; nothing is ever
// raw-squared.
//
//   m = sum x / n,   d = sum (x - m),   q = sum (x - m)^2   ->   mean = m + d / n,   M2 = q - d^2 / n
//
// Any m near the mean will do, and d / n says how far off it is: mean and M2 are then right to the last bits of a
// double. So in rows the first pass looks at every fourth row, unless there are few. By Chan's formula a part of f n
// values has M2 >= f n (m - mean)^2, whatever the values are, hence q <= (1 + 1 / f) M2: the subtraction costs a factor
// of 5 at worst, and as a rule next to nothing.
//
// A record's third and fourth moments, least and largest value ride in the second pass: with t and f the sums of
// (x - m)^3 and (x - m)^4, and e = d / n,  M3 = t - e (3 q - 2 e d),  M4 = f - e (4 t - e (6 q - 3 e d)).
#include <limits>

#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kPart = 4, kFewRows = 64;  // rows: the first pass looks at one in so many, but at all of a few

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// The sums about m become moments about the mean.
BNKERN_INLINE void give_higher(double count, double error, double square, double cube, double fourth, double* m3,
                               double* m4) {
  const double e = error / count;
  *m3 = cube - e * (3 * square - 2 * (e * error));
  *m4 = fourth - e * (4 * cube - e * (6 * square - 3 * (e * error)));
}

template <class T, bool record>
void planes_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const double count = static_cast<double>(tile_count(part, tile));

  V sums[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};  // four, to hide the latency of an addition
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int k = 0; k < 4; k += 2) {
        V values[2];
        load_two(p + i + k * kLanes, values);
        sums[k] = sums[k] + values[0], sums[k + 1] = sums[k + 1] + values[1];
      }
    for (; i + kLanes <= span.length; i += kLanes) sums[0] = sums[0] + load(p + i);
    if (i < span.length) sums[1] = sums[1] + load_some(p + i, static_cast<int>(span.length - i));
  });
  const A first = static_cast<A>(sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<A>(count));
  const V shift = V::all(first);

  V errors[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V squares[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V cubes[2] = {V::all(0), V::all(0)}, fourths[2] = {V::all(0), V::all(0)};
  V lows[2] = {V::all(kInfinity<A>), V::all(kInfinity<A>)}, highs[2] = {V::all(-kInfinity<A>), V::all(-kInfinity<A>)};
  const auto look = [&](int k, V value, V delta) __attribute__((always_inline)) {
    compactly<A>([&]() __attribute__((always_inline)) {
      const V square = delta * delta;
      cubes[k] = fma(square, delta, cubes[k]);
      fourths[k] = fma(square, square, fourths[k]);
      lows[k] = least(value, lows[k]);
      highs[k] = largest(value, highs[k]);
    });
  };
  const auto add = [&](int k, V value) __attribute__((always_inline)) {
    const V delta = value - shift;
    errors[k] = errors[k] + delta;
    squares[k] = fma(delta, delta, squares[k]);
    if constexpr (record) look(k % 2, value, delta);
  };
  const std::int64_t next = next_tile(part, x);
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int k = 0; k < 4; k += 2) {
        const T* const here = p + i + k * kLanes;
        V values[2];
        load_two(here, values);
        __builtin_prefetch(here + next);
        if constexpr (sizeof(T) >= 4) __builtin_prefetch(here + kLanes + next);
        add(k, values[0]), add(k + 1, values[1]);
      }
    for (; i + kLanes <= span.length; i += kLanes) add(0, load(p + i));
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      const V delta = (load_some(p + i, n) - shift).keep(first_lanes<V>(n));
      errors[1] = errors[1] + delta;
      squares[1] = fma(delta, delta, squares[1]);
      if constexpr (record) look(1, load_some(p + i, n, p[i]), delta);
    }
  });
  const double error = sum<A>((errors[0] + errors[1]) + (errors[2] + errors[3]));
  const double square = sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  *out[kMean] = first + error / count;
  *out[kM2] = square - error * (error / count);
  if constexpr (record) {
    give_higher(count, error, square, sum<A>(cubes[0] + cubes[1]), sum<A>(fourths[0] + fourths[1]), out[kM3], out[kM4]);
    *out[kMin] = least_lane<A>(least(lows[0], lows[1]));
    *out[kMax] = largest_lane<A>(largest(highs[0], highs[1]));
  }
}

// Rows: every lane has a channel of its own, so the sums are arrays over the group's channels. Rows are taken four at a
// time: one load and store of a sum serves four values. kVectors: of 16 channels taken at once, 2 where load_two gains
// something; the sums are in its order then.
template <class T, bool record, int kVectors>
void whole_rows(const T* p, std::int64_t stride, std::int64_t next, std::int64_t channels, std::int64_t count,
                Rows<double> out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  struct Values {
    V v[kVectors];
    BNKERN_INLINE explicit Values(const T* from) {
      if constexpr (kVectors == 2)
        load_two(from, v);
      else
        v[0] = load(from);
    }
  };
  A* const shifts = zeroed_scratch<A>((record ? 7 : 3) * channels);
  A *const errors = shifts + channels, *const squares = errors + channels;
  A *const cubes = squares + channels, *const fourths = cubes + channels;
  A *const lows = fourths + channels, *const highs = lows + channels;
  if constexpr (record)
    for (std::int64_t c = 0; c < channels; ++c) lows[c] = kInfinity<A>, highs[c] = -kInfinity<A>;

  const std::int64_t part = count < kFewRows ? 1 : kPart, step = part * stride, seen = (count + part - 1) / part;
  const T* from = p;
  std::int64_t r = 0;
  for (; r + 4 <= seen; r += 4, from += 4 * step)
    for (std::int64_t c = 0; c < channels; c += kVectors * kLanes) {
      for (int k = 0; k < 4; ++k) __builtin_prefetch(from + k * step + c + next, 0, 2);
      const Values x0(from + c), x1(from + step + c), x2(from + 2 * step + c), x3(from + 3 * step + c);
      for (int k = 0; k < kVectors; ++k) {
        A* const to = shifts + c + k * kLanes;
        (V::load(to) + ((x0.v[k] + x1.v[k]) + (x2.v[k] + x3.v[k]))).store(to);
      }
    }
  for (; r < seen; ++r, from += step)
    for (std::int64_t c = 0; c < channels; c += kVectors * kLanes) {
      const Values value(from + c);
      for (int k = 0; k < kVectors; ++k) {
        A* const to = shifts + c + k * kLanes;
        (V::load(to) + value.v[k]).store(to);
      }
    }
  const V share = V::all(A(1) / static_cast<A>(seen));
  for (std::int64_t c = 0; c < channels; c += kLanes) (V::load(shifts + c) * share).store(shifts + c);

  const auto four = [&](std::int64_t c, V x0, V x1, V x2, V x3) __attribute__((always_inline)) {
    const V shift = V::load(shifts + c);
    const V d0 = x0 - shift, d1 = x1 - shift, d2 = x2 - shift, d3 = x3 - shift;
    (V::load(errors + c) + ((d0 + d1) + (d2 + d3))).store(errors + c);
    const V even = fma(d2, d2, d0 * d0), odd = fma(d3, d3, d1 * d1);
    (V::load(squares + c) + (even + odd)).store(squares + c);
    if constexpr (record)
      compactly<A>([&]() __attribute__((always_inline)) {
        const V s0 = d0 * d0, s1 = d1 * d1, s2 = d2 * d2, s3 = d3 * d3;
        (V::load(cubes + c) + (fma(s2, d2, s0 * d0) + fma(s3, d3, s1 * d1))).store(cubes + c);
        (V::load(fourths + c) + (fma(s2, s2, s0 * s0) + fma(s3, s3, s1 * s1))).store(fourths + c);
        least(x0, least(x1, least(x2, least(x3, V::load(lows + c))))).store(lows + c);
        largest(x0, largest(x1, largest(x2, largest(x3, V::load(highs + c))))).store(highs + c);
      });
  };
  const auto one = [&](std::int64_t c, V value) __attribute__((always_inline)) {
    const V delta = value - V::load(shifts + c);
    (V::load(errors + c) + delta).store(errors + c);
    fma(delta, delta, V::load(squares + c)).store(squares + c);
    if constexpr (record) {
      const V square = delta * delta;
      fma(square, delta, V::load(cubes + c)).store(cubes + c);
      fma(square, square, V::load(fourths + c)).store(fourths + c);
      least(value, V::load(lows + c)).store(lows + c);
      largest(value, V::load(highs + c)).store(highs + c);
    }
  };
  for (r = 0; r + 4 <= count; r += 4, p += 4 * stride)
    for (std::int64_t c = 0; c < channels; c += kVectors * kLanes) {
      for (int k = 1; k < 4; ++k) __builtin_prefetch(p + k * stride + c + next, 0, 2);
      const Values x0(p + c), x1(p + stride + c), x2(p + 2 * stride + c), x3(p + 3 * stride + c);
      for (int k = 0; k < kVectors; ++k) four(c + k * kLanes, x0.v[k], x1.v[k], x2.v[k], x3.v[k]);
    }
  for (; r < count; ++r, p += stride)
    for (std::int64_t c = 0; c < channels; c += kVectors * kLanes) {
      const Values value(p + c);
      for (int k = 0; k < kVectors; ++k) one(c + k * kLanes, value.v[k]);
    }

  if constexpr (kVectors == 2)
    for (A* sums = shifts; sums < shifts + (record ? 7 : 3) * channels; sums += 2 * kLanes) put_in_order<T>(sums);
  const double exact_share = 1.0 / static_cast<double>(count);
  for (std::int64_t c = 0; c < channels; ++c) {
    const double error = errors[c];
    out[kMean][c] = shifts[c] + error * exact_share;
    out[kM2][c] = squares[c] - error * (error * exact_share);
  }
  if constexpr (record)
    for (std::int64_t c = 0; c < channels; ++c) {
      give_higher(static_cast<double>(count), errors[c], squares[c], cubes[c], fourths[c], out[kM3] + c, out[kM4] + c);
      out[kMin][c] = lows[c], out[kMax][c] = highs[c];
    }
}

template <class T, bool record>
void rows_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  const std::int64_t channels = tile_channels(part, group, tile), count = tile_count(part, tile);
  const std::int64_t stride = part.dense ? part.width : x.outer, next = next_tile(part, x);
  const std::int64_t row = tile * part.rows_per_tile < part.rows ? tile * part.rows_per_tile : part.rows;
  const T* p = at<const T>(part, x, Span{row, row < part.rows ? group * part.group : 0, 0, 0, 0});

  if (row >= part.rows) {  // the leftover: one value per channel, and perhaps no whole vector
    for (std::int64_t c = 0; c < channels; ++c) out[kMean][c] = widen(p[c]), out[kM2][c] = 0;
    if constexpr (record)
      for (std::int64_t c = 0; c < channels; ++c) {
        out[kM3][c] = out[kM4][c] = 0;
        out[kMin][c] = least<double>(widen(p[c]), kInfinity<double>);
        out[kMax][c] = largest<double>(widen(p[c]), -kInfinity<double>);
      }
    return;
  }
  if constexpr (std::is_same_v<T, BFloat16>)
    if (channels % (2 * kLanes) == 0) return whole_rows<T, record, 2>(p, stride, next, channels, count, out);
  whole_rows<T, record, 1>(p, stride, next, channels, count, out);
}

}  // namespace

template <class T, bool record>
void moments_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  (part.shape.rows ? rows_tile<T, record> : planes_tile<T, record>)(part, x, group, tile, out);
}

#define BNKERN_INSTANTIATE(T)                                                                                    \
  template void moments_tile<T, false>(const Partition&, const View&, std::int64_t, std::int64_t, Rows<double>); \
  template void moments_tile<T, true>(const Partition&, const View&, std::int64_t, std::int64_t, Rows<double>);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
