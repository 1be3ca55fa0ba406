// moments: count, mean and M2 of a tile, from sums about a value m near its mean. Only differences from m are squared.
//
//   d = sum (x - m),   q = sum (x - m)^2   ->   mean = m + d / n,   M2 = q - d^2 / n
//
// m is the mean of a sample, which is a few values from all parts of the tile. So one pass over the tile is enough. The
// subtraction loses digits only if m is many sigma from the mean, and the sums show this: q = M2 + n (m - mean)^2. If
// q > kFar M2 there is a second pass over the tile, whose m is the mean of the first pass. This mean is accurate enough
// for all values. A sample that is the part f of a tile implies M2 >= f n (m - mean)^2 (Chan's formula), so the error
// of the first m is at most sigma / sqrt(f), and d / n corrects it to within rounding.
//
// A record's third and fourth moments and extremes are computed in the same pass. The values that are infinite or NaN
// are counted only in a tile whose mean shows that there are some. With t and f the sums of (x - m)^3 and (x - m)^4,
// and e = d / n:
//
//   M3 = t - e (3 q - 2 e d),   M4 = f - e (4 t - e (6 q - 3 e d))
#include <cmath>
#include <limits>

#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr double kFar = 4;                     // if q / M2 is larger, m is more than sqrt(3) sigma from the mean
constexpr std::int64_t kOneIn = 16;            // the sample is one in 16 of a span's pairs of vectors, or of rows
constexpr std::int64_t kPrefetchBytes = 8192;  // rows: the prefetch distance

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// Computes M3 and M4 from the sums about m.
BNKERN_INLINE void higher_moments(double count, double error, double square, double cube, double fourth, double* m3,
                                  double* m4) {
  const double e = error / count;
  *m3 = cube - e * (3 * square - 2 * (e * error));
  *m4 = fourth - e * (4 * cube - e * (6 * square - 3 * (e * error)));
}

// ---- planes: a tile has one channel, and its sums stay in registers

template <class A>
struct TileSums {
  double error, square, cube, fourth;
  A low, high;
};

template <class T>
BNKERN_INLINE Accumulator<T> sample_mean(const Partition& part, const View& x, std::int64_t group, std::int64_t tile) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  V sums[2] = {V::all(0), V::all(0)};
  std::int64_t sampled = 0;
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    constexpr int pair = 2 * kLanes;
    std::int64_t i = 0;
    for (; i + pair <= span.length; i += kOneIn * pair, sampled += pair) {
      V values[2];
      load_two(p + i, values);
      sums[0] = sums[0] + values[0], sums[1] = sums[1] + values[1];
    }
    if (i == 0) {  // all values of a short span
      for (; i < span.length; i += kLanes)
        sums[0] = sums[0] + load_some(p + i, static_cast<int>(span.length - i < kLanes ? span.length - i : kLanes));
      sampled += span.length;
    }
  });
  return static_cast<A>(sum<A>(sums[0] + sums[1]) / static_cast<A>(sampled));
}

template <class T, bool record>
__attribute__((noinline)) TileSums<Accumulator<T>> pass_over_planes(const Partition& part, const View& x,
                                                                    std::int64_t group, std::int64_t tile,
                                                                    Accumulator<T> center) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const V shift = V::all(center);
  V errors[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};  // four sums hide the latency of an addition
  V squares[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V cubes[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V fourths[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V lows[2] = {V::all(kInfinity<A>), V::all(kInfinity<A>)}, highs[2] = {V::all(-kInfinity<A>), V::all(-kInfinity<A>)};
  const auto add_higher = [&](int k, V value, V delta) __attribute__((always_inline)) {
    compactly<A>([&]() __attribute__((always_inline)) {
      const V square = delta * delta;
      cubes[k] = fma(square, delta, cubes[k]);
      fourths[k] = fma(square, square, fourths[k]);
      lows[k % 2] = least(value, lows[k % 2]);
      highs[k % 2] = largest(value, highs[k % 2]);
    });
  };
  const auto add = [&](int k, V value) __attribute__((always_inline)) {
    const V delta = value - shift;
    errors[k] = errors[k] + delta;
    squares[k] = fma(delta, delta, squares[k]);
    if constexpr (record) add_higher(k, value, delta);
  };
  const std::int64_t next = next_tile(part, x);
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* p = at<const T>(part, x, span);
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int k = 0; k < 4; k += 2) {
        const T* const from = p + i + k * kLanes;
        V values[2];
        load_two(from, values);
        __builtin_prefetch(from + next);
        if constexpr (sizeof(T) >= 4) __builtin_prefetch(from + kLanes + next);
        add(k, values[0]), add(k + 1, values[1]);
      }
    for (; i + kLanes <= span.length; i += kLanes) add(0, load(p + i));
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      const auto present = first_lanes<V>(n);
      const V delta = (load_some(p + i, n) - shift).keep(present);
      errors[1] = errors[1] + delta;
      squares[1] = fma(delta, delta, squares[1]);
      if constexpr (record) add_higher(1, load_some(p + i, n, p[i]), delta);
    }
  });
  TileSums<A> sums{};
  sums.error = sum<A>((errors[0] + errors[1]) + (errors[2] + errors[3]));
  sums.square = sum<A>((squares[0] + squares[1]) + (squares[2] + squares[3]));
  if constexpr (record) {
    sums.cube = sum<A>((cubes[0] + cubes[1]) + (cubes[2] + cubes[3]));
    sums.fourth = sum<A>((fourths[0] + fourths[1]) + (fourths[2] + fourths[3]));
    sums.low = least_lane<A>(least(lows[0], lows[1]));
    sums.high = largest_lane<A>(largest(highs[0], highs[1]));
  }
  return sums;
}

template <class T, bool record>
void planes_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  using A = Accumulator<T>;
  const double count = static_cast<double>(tile_count(part, tile));
  A center = sample_mean<T>(part, x, group, tile);
  TileSums<A> sums = pass_over_planes<T, record>(part, x, group, tile, center);
  const auto m2 = [&] { return sums.square - sums.error * (sums.error / count); };
  if (sums.square > kFar * m2()) {
    center = static_cast<A>(center + sums.error / count);
    sums = pass_over_planes<T, record>(part, x, group, tile, center);
  }
  *out[kMean] = center + sums.error / count;
  *out[kM2] = m2();
  if constexpr (record) {
    higher_moments(count, sums.error, sums.square, sums.cube, sums.fourth, out[kM3], out[kM4]);
    *out[kMin] = sums.low, *out[kMax] = sums.high;
  }
}

// ---- rows: every lane is a channel, so the sums are arrays over the group's channels

// The rows of a tile, and the distance to the tile that is read next. kVectors is the number of vectors of 16 channels
// that are loaded at once. It is 2 if load_two is faster than two loads; the sums then have the order of load_two.
template <class T, int kVectors>
struct TileRows {
  using V = Vec<Accumulator<T>>;
  static constexpr int kStep = kVectors * kLanes;
  const T* p;
  std::int64_t stride, count, channels, next;

  // The sample is one row in one_in(): at least eight rows, and all rows of a small tile.
  BNKERN_INLINE std::int64_t one_in() const {
    if (count < 32) return 1;
    return count < 64 ? 4 : count < 128 ? 8 : kOneIn;
  }
  BNKERN_INLINE void load(std::int64_t r, std::int64_t c, V* to) const {
    const T* const from = p + r * stride + c;
    if constexpr (kVectors == 2)
      load_two(from, to);
    else
      to[0] = BNKERN_ISA::load(from);
  }
};

template <class A>
struct ColumnSums {
  A *shifts, *errors, *squares, *cubes, *fourths, *lows, *highs;
};

// Computes m of every channel. All sums must be zero before.
template <class T, int kVectors>
BNKERN_INLINE void sample_rows(TileRows<T, kVectors> rows, Accumulator<T>* shifts) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const std::int64_t one_in = rows.one_in(), sampled = divide_up(rows.count, one_in);
  std::int64_t r = 0;
  for (; r + 4 <= sampled; r += 4)
    for (std::int64_t c = 0; c < rows.channels; c += rows.kStep) {
      V x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
      rows.load(r * one_in, c, x0), rows.load((r + 1) * one_in, c, x1);
      rows.load((r + 2) * one_in, c, x2), rows.load((r + 3) * one_in, c, x3);
      for (int k = 0; k < kVectors; ++k) {
        A* const to = shifts + c + k * kLanes;
        (V::load(to) + ((x0[k] + x1[k]) + (x2[k] + x3[k]))).store(to);
      }
    }
  for (; r < sampled; ++r)
    for (std::int64_t c = 0; c < rows.channels; c += rows.kStep) {
      V values[kVectors];
      rows.load(r * one_in, c, values);
      for (int k = 0; k < kVectors; ++k) {
        A* const to = shifts + c + k * kLanes;
        (V::load(to) + values[k]).store(to);
      }
    }
  const V share = V::all(A(1) / static_cast<A>(sampled));
  for (std::int64_t c = 0; c < rows.channels; c += kLanes) (V::load(shifts + c) * share).store(shifts + c);
}

// Adds up all columns, four rows at a time, so each sum is loaded and stored once for four values.
template <bool record, class T, int kVectors>
__attribute__((noinline)) void pass_over_rows(TileRows<T, kVectors> rows, ColumnSums<Accumulator<T>> sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  if constexpr (record)
    for (std::int64_t c = 0; c < rows.channels; ++c) sums.lows[c] = kInfinity<A>, sums.highs[c] = -kInfinity<A>;
  const auto four = [&](std::int64_t c, V x0, V x1, V x2, V x3) __attribute__((always_inline)) {
    const V shift = V::load(sums.shifts + c);
    const V d0 = x0 - shift, d1 = x1 - shift, d2 = x2 - shift, d3 = x3 - shift;
    (V::load(sums.errors + c) + ((d0 + d1) + (d2 + d3))).store(sums.errors + c);
    const V even = fma(d2, d2, d0 * d0), odd = fma(d3, d3, d1 * d1);
    (V::load(sums.squares + c) + (even + odd)).store(sums.squares + c);
    if constexpr (record)
      compactly<A>([&]() __attribute__((always_inline)) {
        const V s0 = d0 * d0, s1 = d1 * d1, s2 = d2 * d2, s3 = d3 * d3;
        (V::load(sums.cubes + c) + (fma(s2, d2, s0 * d0) + fma(s3, d3, s1 * d1))).store(sums.cubes + c);
        (V::load(sums.fourths + c) + (fma(s2, s2, s0 * s0) + fma(s3, s3, s1 * s1))).store(sums.fourths + c);
        least(x0, least(x1, least(x2, least(x3, V::load(sums.lows + c))))).store(sums.lows + c);
        largest(x0, largest(x1, largest(x2, largest(x3, V::load(sums.highs + c))))).store(sums.highs + c);
      });
  };
  const auto one = [&](std::int64_t c, V value) __attribute__((always_inline)) {
    const V delta = value - V::load(sums.shifts + c);
    (V::load(sums.errors + c) + delta).store(sums.errors + c);
    fma(delta, delta, V::load(sums.squares + c)).store(sums.squares + c);
    if constexpr (record) {
      const V square = delta * delta;
      fma(square, delta, V::load(sums.cubes + c)).store(sums.cubes + c);
      fma(square, square, V::load(sums.fourths + c)).store(sums.fourths + c);
      least(value, V::load(sums.lows + c)).store(sums.lows + c);
      largest(value, V::load(sums.highs + c)).store(sums.highs + c);
    }
  };
  // Prefetch in the order of addresses, because the hardware prefetchers follow that order. Prefetch the sample of the
  // next tile too.
  const std::int64_t run = rows.stride == rows.channels ? rows.count * rows.stride : rows.channels;  // without gaps
  const T* ahead =
      rows.p + divide_up(kPrefetchBytes, rows.channels * static_cast<std::int64_t>(sizeof(T))) * rows.stride;
  const T* run_end = ahead + run;
  std::int64_t r = 0;
  for (; r + 4 <= rows.count; r += 4) {
    if (r % rows.one_in() == 0)
      for (std::int64_t c = 0; c < rows.channels; c += rows.kStep)
        __builtin_prefetch(rows.p + r * rows.stride + c + rows.next, 0, 2);
    for (std::int64_t c = 0; c < rows.channels; c += rows.kStep) {
      for (int k = 0; k < 4; ++k) __builtin_prefetch(ahead + k * rows.kStep);
      ahead += 4 * rows.kStep;
      if (ahead >= run_end) ahead = run_end + rows.stride - run, run_end += rows.stride;
      V x0[kVectors], x1[kVectors], x2[kVectors], x3[kVectors];
      rows.load(r, c, x0), rows.load(r + 1, c, x1), rows.load(r + 2, c, x2), rows.load(r + 3, c, x3);
      for (int k = 0; k < kVectors; ++k) four(c + k * kLanes, x0[k], x1[k], x2[k], x3[k]);
    }
  }
  for (; r < rows.count; ++r)
    for (std::int64_t c = 0; c < rows.channels; c += rows.kStep) {
      V values[kVectors];
      rows.load(r, c, values);
      for (int k = 0; k < kVectors; ++k) one(c + k * kLanes, values[k]);
    }
}

template <bool record, class T, int kVectors>
void whole_rows(TileRows<T, kVectors> rows, Rows<double> out) {
  using A = Accumulator<T>;
  const std::int64_t channels = rows.channels;
  constexpr int arrays = record ? 7 : 3;
  A* const all = zeroed_scratch<A>(arrays * channels);
  const auto sums_from = [&](std::int64_t c) {
    A* const a = all + c;
    return ColumnSums<A>{
        a, a + channels, a + 2 * channels, a + 3 * channels, a + 4 * channels, a + 5 * channels, a + 6 * channels};
  };
  const ColumnSums<A> sums = sums_from(0);
  sample_rows(rows, sums.shifts);
  pass_over_rows<record>(rows, sums);

  using V = Vec<A>;
  const double count = static_cast<double>(rows.count), share = 1 / count;
  const V scale = V::all(static_cast<A>(kFar * share)), limit = V::all(static_cast<A>(1 - kFar));
  for (std::int64_t begin = 0; begin < channels; begin += rows.kStep) {
    bool far = false;
    for (std::int64_t c = begin; c < begin + rows.kStep; c += kLanes) {
      const V error = V::load(sums.errors + c);
      far |= fma(V::load(sums.squares + c), limit, error * (error * scale)).above_zero().bits() != 0;
    }
    if (!far) continue;
    for (std::int64_t c = begin; c < begin + rows.kStep; ++c) {
      sums.shifts[c] = static_cast<A>(sums.shifts[c] + sums.errors[c] * share);
      for (int k = 1; k < arrays; ++k) all[k * channels + c] = 0;
    }
    TileRows<T, kVectors> columns = rows;
    columns.p += begin, columns.channels = rows.kStep;
    pass_over_rows<record>(columns, sums_from(begin));
  }
  if constexpr (kVectors == 2)
    for (A* two = all; two < all + arrays * channels; two += rows.kStep) put_in_order<T>(two);
  const A *const shifts = sums.shifts, *const errors = sums.errors, *const squares = sums.squares;
  for (std::int64_t c = 0; c < channels; ++c) {
    const double error = errors[c];
    out[kMean][c] = shifts[c] + error * share;
    out[kM2][c] = squares[c] - error * (error * share);
  }
  if constexpr (record)
    for (std::int64_t c = 0; c < channels; ++c) {
      higher_moments(count, sums.errors[c], sums.squares[c], sums.cubes[c], sums.fourths[c], out[kM3] + c,
                     out[kM4] + c);
      out[kMin][c] = sums.lows[c], out[kMax][c] = sums.highs[c];
    }
}

template <class T, bool record>
void rows_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  const std::int64_t channels = tile_channels(part, group, tile), count = tile_count(part, tile);
  const std::int64_t stride = part.dense ? part.width : x.outer, next = next_tile(part, x);
  const std::int64_t row = tile * part.rows_per_tile < part.rows ? tile * part.rows_per_tile : part.rows;
  const T* p = at<const T>(part, x, Span{row, row < part.rows ? group * part.group : 0, 0, 0, 0});

  if (row >= part.rows) {  // the leftover has one value per channel, and may be shorter than a vector
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
    if (channels % (2 * kLanes) == 0) return whole_rows<record>(TileRows<T, 2>{p, stride, count, channels, next}, out);
  whole_rows<record>(TileRows<T, 1>{p, stride, count, channels, next}, out);
}

}  // namespace

template <class T, bool record>
void moments_tile(const Partition& part, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out) {
  (part.shape.rows ? rows_tile<T, record> : planes_tile<T, record>)(part, x, group, tile, out);
  if constexpr (record) {
    const std::int64_t channels = tile_channels(part, group, tile);
    bool finite = true;
    for (std::int64_t c = 0; c < channels; ++c) out[kNonfinite][c] = 0, finite &= std::isfinite(out[kMean][c]);
    if (!finite) add_nonfinite<T>(part, x, group, tile, out[kNonfinite]);
  }
}

#define BNKERN_INSTANTIATE(T)                                                                                    \
  template void moments_tile<T, false>(const Partition&, const View&, std::int64_t, std::int64_t, Rows<double>); \
  template void moments_tile<T, true>(const Partition&, const View&, std::int64_t, std::int64_t, Rows<double>);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
