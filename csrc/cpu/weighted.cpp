// moments and grad_input of a call with sample_weight. With weights w and W = sum w, per channel:
//
//   mean = sum w x / W,   M2 = sum w (x - mean)^2,   dx = scale (g - w / W (sum g + xhat sum g xhat))
//
// A value whose weight is not above zero is replaced by zero before it is added, because 0 * x is NaN if x is infinite
// or NaN. The other phases need no weights, so these instances are separate and the code without weights is unchanged.
// One instance serves all masks, which costs a branch for each vector.
//
// moments looks at a tile two times, while it is in cache. The first look gives a mean m of the tile, and the second
// one the sums d = sum w (x - m) and q = sum w (x - m)^2, which correct the rounding of m:
//
//   mean = m + d / W,   M2 = q - d^2 / W
//
// If d has most of q, rounding moved m far from the mean, and there is a third look from the corrected m.
#include "gradient.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr double kFar = 4;  // as in moments.cpp

// The weights of the elements of a span. For planes they are adjacent in memory. For rows all elements of a row have
// its weight, which is copied to all of them in `buffer`. This costs a store for each vector, and serves wide rows too.
template <class A>
BNKERN_INLINE const A* weights_of(const Partition& part, const A* weights, const Span& span, A* buffer) {
  if (!part.shape.rows) return weights + span.n * part.shape.s + span.s;
  const std::int64_t rows = part.width / part.shape.c;  // in a wide row
  const std::int64_t step = rows == 1 ? span.length : part.shape.c;
  for (std::int64_t row = 0; row * step < span.length; ++row)
    for (std::int64_t i = 0; i < step; ++i) buffer[row * step + i] = weights[span.n * rows + row];
  return buffer;
}

BNKERN_INLINE int lanes_from(std::int64_t i, std::int64_t length) {
  return static_cast<int>(length - i < kLanes ? length - i : kLanes);
}
template <class T>
BNKERN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int n) {
  return n == kLanes ? load(p) : load_some(p, n);
}

// sum w, sum w (x - m) and sum w (x - m)^2 of each lane.
template <class A>
struct WeightedSums {
  using V = Vec<A>;
  V weight = V::all(0), error = V::all(0), square = V::all(0);
  BNKERN_INLINE void add(V value, V w, V m) {
    const auto counted = w.above_zero();
    const V delta = (value - m).keep(counted), product = w * delta;
    weight = weight + w.keep(counted);
    error = error + product;
    square = fma(product, delta, square);
  }
};

// The results of a tile for one channel, from its sums about m. Returns whether m was far from the mean.
BNKERN_INLINE bool finish_channel(double m, double weight, double error, double square, double* mean, double* m2) {
  const double distance = weight > 0 || weight != weight ? error / weight : 0;  // NaN stays NaN
  *mean = m + distance;
  *m2 = square - error * distance;
  return square > kFar * *m2;
}

template <class T>
__attribute__((noinline)) void look_at_planes(const Partition& part, const View& x, const Accumulator<T>* weights,
                                              std::int64_t group, std::int64_t tile, double center,
                                              Accumulator<T>* sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const V m = V::all(static_cast<A>(center));
  WeightedSums<A> even, odd;  // two sums hide half the latency of an addition
  for_spans(part, group, tile, [&](const Span& span) {
    const T* const p = at<const T>(part, x, span);
    const A* const w = weights_of<A>(part, weights, span, nullptr);
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= span.length; i += 2 * kLanes) {
      even.add(load(p + i), load(w + i), m);
      odd.add(load(p + i + kLanes), load(w + i + kLanes), m);
    }
    for (; i < span.length; i += kLanes) {
      const int n = lanes_from(i, span.length);
      even.add(load_lanes(p + i, n), load_lanes(w + i, n), m);
    }
  });
  sums[0] = sum<A>(even.weight + odd.weight);
  sums[1] = sum<A>(even.error + odd.error);
  sums[2] = sum<A>(even.square + odd.square);
}

template <class T>
void moments_of_planes(const Partition& part, const View& x, const Accumulator<T>* weights, std::int64_t group,
                       std::int64_t tile, Rows<double> out) {
  using A = Accumulator<T>;
  A sums[3];
  double mean = 0, m2 = 0;
  bool far = true;
  for (int look = 0; look < 2 || (look == 2 && far); ++look) {
    const double m = static_cast<A>(mean);
    look_at_planes<T>(part, x, weights, group, tile, m, sums);
    far = finish_channel(m, sums[0], sums[1], sums[2], &mean, &m2);
  }
  *out[kMean] = mean, *out[kM2] = m2, *out[kWeight] = sums[0];
}

// Adds the rows of a tile to the sums [3][vectors] about the m of each channel.
template <class T>
__attribute__((noinline)) void look_at_rows(const Partition& part, const View& x, const Accumulator<T>* weights,
                                            std::int64_t group, std::int64_t tile, const Accumulator<T>* m,
                                            Rows<Accumulator<T>> sums, Accumulator<T>* buffer) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  for_spans(part, group, tile, [&](const Span& span) {
    const T* const p = at<const T>(part, x, span);
    const A* const w = weights_of<A>(part, weights, span, buffer);
    for (std::int64_t i = 0; i < span.length; i += kLanes) {
      const int n = lanes_from(i, span.length);
      WeightedSums<A> to{V::load(sums[0] + i), V::load(sums[1] + i), V::load(sums[2] + i)};
      to.add(load_lanes(p + i, n), load_lanes(w + i, n), V::load(m + i));
      to.weight.store(sums[0] + i), to.error.store(sums[1] + i), to.square.store(sums[2] + i);
    }
  });
}

template <class T>
void moments_of_rows(const Partition& part, const View& x, const Accumulator<T>* weights, std::int64_t group,
                     std::int64_t tile, Rows<double> out) {
  using A = Accumulator<T>;
  const std::int64_t channels = tile_channels(part, group, tile), vectors = round_up(channels, kLanes);
  A* const m = zeroed_scratch<A>(5 * vectors);
  A* const buffer = m + vectors;
  const Rows<A> sums{buffer + vectors, vectors};
  bool far = true;
  for (int look = 0; look < 2 || (look == 2 && far); ++look) {
    std::memset(sums.data, 0, 3 * vectors * sizeof(A));
    look_at_rows<T>(part, x, weights, group, tile, m, sums, buffer);
    bool any_far = false;
    for (std::int64_t c = 0; c < channels; ++c) {
      const bool moved = finish_channel(m[c], sums[0][c], sums[1][c], sums[2][c], out[kMean] + c, out[kM2] + c);
      out[kWeight][c] = sums[0][c];
      // A third look keeps the m of the other channels, so that their bits do not depend on this channel.
      if (look == 0 || moved) m[c] = static_cast<A>(out[kMean][c]);
      any_far |= moved;
    }
    far = any_far;
  }
}

template <class Channel, class T>
void grad_input_of(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                   const Accumulator<T>* weights, std::int64_t group, std::int64_t tile) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  A* const buffer = part.shape.rows ? zeroed_scratch<A>(tile_channels(part, group, tile)) : nullptr;
  for_spans(part, group, tile, [&](const Span& span) {
    const Gradient<MaskSource::kAny, Channel, T> gradient(part, t, k, span);
    const Channel mean_dy(k.mean_dy, span.c), mean_dy_xhat(k.mean_dy_xhat, span.c), scale(k.scale, span.c);
    const A* const w = weights_of<A>(part, weights, span, buffer);
    T* const dx = at<T>(part, t.dx, span);
    T* const dresidual = t.dresidual ? at<T>(part, t.dresidual, span) : nullptr;
    const bool past_cache = t.stream && streamable(dx) && streamable(dresidual);
    const auto write = [&](std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n), weight = load_lanes(w + i, n);
      const V common = (weight * fma(xhat, mean_dy_xhat[i], mean_dy[i])).keep(weight.above_zero());
      const auto of_x = Packed<T>::of((g - common) * scale[i]), of_residual = Packed<T>::of(g);
      if (n < kLanes) {
        put_some(dx + i, of_x, n);
        if (dresidual) put_some(dresidual + i, of_residual, n);
      } else {
        put(dx + i, of_x, past_cache);
        if (dresidual) put(dresidual + i, of_residual, past_cache);
      }
    };
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) write(i, kLanes);
    if (i < span.length) write(i, lanes_from(i, span.length));
  });
}

}  // namespace

template <class T>
void weighted_moments_tile(const Partition& part, const View& x, const Accumulator<T>* weights, std::int64_t group,
                           std::int64_t tile, Rows<double> out) {
  (part.shape.rows ? moments_of_rows<T> : moments_of_planes<T>)(part, x, weights, group, tile, out);
}

template <class T>
void weighted_grad_input_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                              const Accumulator<T>* weights, std::int64_t group, std::int64_t tile) {
  using A = Accumulator<T>;
  (part.shape.rows ? grad_input_of<RowChannels<A>, T> : grad_input_of<PlaneChannel<A>, T>)(part, t, k, weights, group,
                                                                                           tile);
}

template <class A>
double sum_of_weights(const A* weights, std::int64_t count) {
  using V = Vec<A>;
  constexpr std::int64_t kAtOnce = 64 * kLanes;  // the values of one sum in type A
  double total = 0;
  for (std::int64_t first = 0; first < count; first += kAtOnce) {
    const std::int64_t end = first + kAtOnce < count ? first + kAtOnce : count;
    V part = V::all(0);
    for (std::int64_t i = first; i < end; i += kLanes) {
      const V w = load_lanes(weights + i, lanes_from(i, end));
      part = part + w.keep(w.above_zero());
    }
    total += sum<A>(part);
  }
  return total;
}

#define BNKERN_INSTANTIATE(T)                                                                                         \
  template void weighted_moments_tile<T>(const Partition&, const View&, const Accumulator<T>*, std::int64_t,          \
                                         std::int64_t, Rows<double>);                                                 \
  template void weighted_grad_input_tile<T>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                            const Accumulator<T>*, std::int64_t, std::int64_t);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)
template double sum_of_weights<float>(const float*, std::int64_t);
template double sum_of_weights<double>(const double*, std::int64_t);

}  // namespace bnkern::BNKERN_ISA
