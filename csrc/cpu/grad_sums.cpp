// grad_sums computes sum g and sum g * xhat of each channel, which are the gradients of bias and weight. It reads dy
// and x once. For a record it also computes the absolute sums, the sums of signs and the numbers of zeros of the
// summands g and g * xhat.
#include "gradient.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

// The sums that a record needs in addition to sum g and sum g * xhat.
template <class A>
struct SummandSizes : Sums<A, kRecordedGradSumsRows> {
  using V = Vec<A>;
  BNKERN_INLINE void add(V g, V xhat, V one) {
    compactly<A>([&]() __attribute__((always_inline)) {
      add_one(this->row + kOfDy, g, one);
      add_one(this->row + kOfDyXhat, g * xhat, one);
    });
  }
  BNKERN_INLINE void add_some(V g, V xhat, int n) { add(g, xhat, V::all(1).keep(first_lanes<V>(n))); }

 private:
  static BNKERN_INLINE void add_one(V* row, V d, V one) {
    row[kAbsSum] = row[kAbsSum] + d.magnitude();
    row[kSignSum] = row[kSignSum].plus_sign(d);
    row[kZeros] = row[kZeros].plus_where_zero(d, one);
  }
};

template <MaskSource source, class Channel, class T>
void second_look_at_summands(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                             std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sizes_out) {
  using A = Accumulator<T>;
  second_look<SummandSizes<A>, std::is_same_v<Channel, RowChannels<A>>>(
      part, group, tile, sizes_out, [&](const Span& span) {
        return
            [gradient = Gradient<source, Channel, T>(part, t, k, span)](SummandSizes<A>& sizes, std::int64_t i, int n) {
              const Vec<A> xhat = gradient.xhat(i, n);
              sizes.add_some(gradient.g(i, xhat, n), xhat, n);
            };
      });
}

template <MaskSource source, class Channel, bool record, class T>
BNKERN_INLINE void planes_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                               std::int64_t group, std::int64_t tile, Rows<double> out,
                               Rows<Accumulator<T>> sizes_out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  SummandSizes<A> sizes{SummandSizes<A>::zero()};
  V sums[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V products[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const Gradient<source, Channel, T> gradient(part, t, k, span);
    const auto add = [&](int which, std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
      sums[which] = sums[which] + g;
      products[which] = fma(g, xhat, products[which]);
      if constexpr (record) n == kLanes ? sizes.add(g, xhat, V::all(1)) : sizes.add_some(g, xhat, n);
    };
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int which = 0; which < 4; ++which) add(which, i + which * kLanes, kLanes);
    for (; i + kLanes <= span.length; i += kLanes) add(0, i, kLanes);
    if (i < span.length) add(1, i, static_cast<int>(span.length - i));
  });
  *out[kSumDy] = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *out[kSumDyXhat] = sum<A>((products[0] + products[1]) + (products[2] + products[3]));
  if constexpr (record) sizes.fold(sizes_out);
}

// Every lane is a channel, so the sums are arrays over the group's channels.
template <MaskSource source, class Channel, bool record, class T>
BNKERN_INLINE void rows_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                             std::int64_t group, std::int64_t tile, Rows<double> out, Rows<Accumulator<T>> sizes_out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using Row = Gradient<source, Channel, T>;
  using Sizes = SummandSizes<A>;
  const std::int64_t channels = tile_channels(part, group, tile);
  const std::int64_t vectors = (channels + kLanes - 1) / kLanes * kLanes;
  A* const sums = zeroed_scratch<A>(2 * vectors);
  A* const products = sums + vectors;

  const auto place = [&](const Span& span) { return t.g ? at<T>(part, t.g, span) : nullptr; };
  const auto add_row = [&](const Span& span) __attribute__((always_inline)) {
    const Row row(part, t, k, span);
    T* const stored = place(span);
    const auto add = [&](std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = row.xhat(i, n), g = row.g(i, xhat, n);
      if (stored) put_some(stored + i, Packed<T>::of(g), n);
      (V::load(sums + i) + g).store(sums + i);
      fma(g, xhat, V::load(products + i)).store(products + i);
      if constexpr (record) {
        Sizes sizes{Sizes::load(sizes_out, i)};
        n == kLanes ? sizes.add(g, xhat, V::all(1)) : sizes.add_some(g, xhat, n);
        sizes.store(sizes_out, i);
      }
    };
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) add(i, kLanes);
    if (i < span.length) add(i, static_cast<int>(span.length - i));
  };
  const auto add_four_rows = [&](const Span* spans) __attribute__((always_inline)) {
    const Row r0(part, t, k, spans[0]), r1(part, t, k, spans[1]), r2(part, t, k, spans[2]), r3(part, t, k, spans[3]);
    T* const stored[] = {place(spans[0]), place(spans[1]), place(spans[2]), place(spans[3])};
    for (std::int64_t i = 0; i < channels; i += kLanes) {
      const V x0 = r0.xhat(i), x1 = r1.xhat(i), x2 = r2.xhat(i), x3 = r3.xhat(i);
      const V g0 = r0.g(i, x0), g1 = r1.g(i, x1), g2 = r2.g(i, x2), g3 = r3.g(i, x3);
      if (stored[0]) {
        put(stored[0] + i, Packed<T>::of(g0), false), put(stored[1] + i, Packed<T>::of(g1), false);
        put(stored[2] + i, Packed<T>::of(g2), false), put(stored[3] + i, Packed<T>::of(g3), false);
      }
      (V::load(sums + i) + ((g0 + g1) + (g2 + g3))).store(sums + i);
      const V even = fma(g2, x2, g0 * x0), odd = fma(g3, x3, g1 * x1);
      (V::load(products + i) + (even + odd)).store(products + i);
      if constexpr (record) {
        Sizes sizes{Sizes::load(sizes_out, i)};
        sizes.add(g0, x0, V::all(1)), sizes.add(g1, x1, V::all(1));
        sizes.add(g2, x2, V::all(1)), sizes.add(g3, x3, V::all(1));
        sizes.store(sizes_out, i);
      }
    }
  };
  for_rows(part, group, tile, add_four_rows, add_row);
  for (std::int64_t c = 0; c < channels; ++c) out[kSumDy][c] = sums[c], out[kSumDyXhat][c] = products[c];
}

}  // namespace

template <class T, bool record>
void grad_sums_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                    std::int64_t group, std::int64_t tile, Rows<double> out, Rows<Accumulator<T>> sizes_out) {
  using A = Accumulator<T>;
  constexpr bool twice = record && kArrayVec<A>;
  if constexpr (twice) grad_sums_tile<T, false>(part, t, k, group, tile, out, sizes_out);
  with_mask_source<A>(part, t, [&]<MaskSource source, class Channel>() __attribute__((always_inline)) {
    if constexpr (twice)
      second_look_at_summands<source, Channel>(part, t, k, group, tile, sizes_out);
    else if constexpr (std::is_same_v<Channel, RowChannels<A>>)
      rows_tile<source, Channel, record>(part, t, k, group, tile, out, sizes_out);
    else
      planes_tile<source, Channel, record>(part, t, k, group, tile, out, sizes_out);
  });
}

#define BNKERN_INSTANTIATE_AS(T, record)                                                                            \
  template void grad_sums_tile<T, record>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                          std::int64_t, std::int64_t, Rows<double>, Rows<Accumulator<T>>);
#define BNKERN_INSTANTIATE(T)     \
  BNKERN_INSTANTIATE_AS(T, false) \
  BNKERN_INSTANTIATE_AS(T, true)
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
