// grad_input: dx = weight * invstd * (g - sum g / M - xhat * sum g xhat / M), or weight * invstd * g in eval
// mode, and the residual's gradient g. One read of dy and x, one write each. For a record, sums and counts of
// signs of dx, as stored.
#include "gradient.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class A>
struct InputSums : Sums<A, kRecordedGradInputRows> {
  using V = Vec<A>;
  BNKERN_INLINE void add(V dx, V one) {
    this->row[kSum] = this->row[kSum] + dx;
    this->row[kSquareSum] = fma(dx, dx, this->row[kSquareSum]);
    this->add_sizes(kOfDx, dx, one);
  }
};

// A span of the tensors read and written.
template <ReluMask kind, class Channel, class T>
struct InputSpan {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const Gradient<kind, Channel, T> gradient;
  const bool training;
  T *const dx, *const dresidual;
  const bool past_cache;
  const Channel mean_dy, mean_dy_xhat, scale;

  BNKERN_INLINE InputSpan(const Partition& part, const Tensors<T>& t, const Coefficients<A>& k, const Span& span)
      : gradient(part, t, k, span),
        training(t.training),
        dx(t.dx ? at<T>(part, t.dx, span) : nullptr),
        dresidual(t.dresidual ? at<T>(part, t.dresidual, span) : nullptr),
        past_cache(t.stream && streamable(dx) && streamable(dresidual)),
        mean_dy(k.mean_dy, span.c),
        mean_dy_xhat(k.mean_dy_xhat, span.c),
        scale(k.scale, span.c) {}

  // Calls look(dx, one) with the value stored, one is 1 in its lanes.
  template <class Look>
  BNKERN_INLINE void write(std::int64_t i, Look look) const {
    const V xhat = gradient.xhat(i), g = gradient.g(i, xhat);
    if (dx) {
      const auto packed = Packed<T>::of(input(i, xhat, g));
      put(dx + i, packed, past_cache);
      look(packed.wide(), V::all(1));
    }
    if (dresidual) put(dresidual + i, Packed<T>::of(g), past_cache);
  }
  template <class Look>
  BNKERN_INLINE void write_some(std::int64_t i, int n, Look look) const {
    const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
    if (dx) {
      const auto packed = Packed<T>::of(input(i, xhat, g));
      put_some(dx + i, packed, n);
      look(packed.wide().keep(first_lanes<V>(n)), V::all(1).keep(first_lanes<V>(n)));
    }
    if (dresidual) put_some(dresidual + i, Packed<T>::of(g), n);
  }

 private:
  BNKERN_INLINE V input(std::int64_t i, V xhat, V g) const {
    return training ? input_gradient(g, xhat, mean_dy[i], mean_dy_xhat[i], scale[i]) : g * scale[i];
  }
};

template <ReluMask kind, class Channel, bool record, class T>
BNKERN_INLINE void planes_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                               std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums_out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  InputSums<A> sums{InputSums<A>::zero()};
  const auto look = [&](V dx, V one) __attribute__((always_inline)) {
    if constexpr (record) sums.add(dx, one);
  };
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const InputSpan<kind, Channel, T> place(part, t, k, span);
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) place.write(i, look);
    if (i < span.length) place.write_some(i, static_cast<int>(span.length - i), look);
  });
  if constexpr (record) sums.fold(sums_out);
}

template <ReluMask kind, class Channel, class T>
BNKERN_INLINE void recorded_rows_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                                      std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums_out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using Place = InputSpan<kind, Channel, T>;
  const std::int64_t channels = tile_channels(part, group, tile);

  // Calls f(look) with the sums of 16 channels loaded.
  const auto with_sums = [&](std::int64_t i, auto f) __attribute__((always_inline)) {
    InputSums<A> sums{InputSums<A>::load(sums_out, i)};
    f([&](V dx, V one) __attribute__((always_inline)) { sums.add(dx, one); });
    sums.store(sums_out, i);
  };
  const auto one = [&](const Span& span) __attribute__((always_inline)) {
    const Place place(part, t, k, span);
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes)
      with_sums(i, [&](auto look) __attribute__((always_inline)) { place.write(i, look); });
    if (i < span.length)
      with_sums(i, [&](auto look) __attribute__((always_inline)) {
        place.write_some(i, static_cast<int>(span.length - i), look);
      });
  };
  const auto four = [&](const Span* spans) __attribute__((always_inline)) {
    if constexpr (std::is_same_v<V, ArrayVec<A>>) {  // the same sums, with less code
      for (int r = 0; r < 4; ++r) one(spans[r]);
    } else {
      const Place places[4] = {
          {part, t, k, spans[0]}, {part, t, k, spans[1]}, {part, t, k, spans[2]}, {part, t, k, spans[3]}};
      for (std::int64_t i = 0; i < channels; i += kLanes)
        with_sums(i, [&](auto look) __attribute__((always_inline)) {
          for (int r = 0; r < 4; ++r) places[r].write(i, look);
        });
    }
  };
  for_rows(part, group, tile, four, one);
}

}  // namespace

template <class T, bool record>
void grad_input_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                     std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums_out) {
  using A = Accumulator<T>;
  with_gradient_kind<A>(part, t, [&]<ReluMask kind, class Channel>() __attribute__((always_inline)) {
    if constexpr (record && std::is_same_v<Channel, RowChannels<A>>)
      recorded_rows_tile<kind, Channel>(part, t, k, group, tile, sums_out);
    else
      planes_tile<kind, Channel, record>(part, t, k, group, tile, sums_out);
  });
}

#define BNKERN_INSTANTIATE_AS(T, record)                                                                             \
  template void grad_input_tile<T, record>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                           std::int64_t, std::int64_t, Rows<Accumulator<T>>);
#define BNKERN_INSTANTIATE(T)     \
  BNKERN_INSTANTIATE_AS(T, false) \
  BNKERN_INSTANTIATE_AS(T, true)
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
