// grad_sums: sum g and sum g * xhat per channel, the gradients of bias and weight. One read of dy and x.
#include "gradient.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <ReluMask kind, class Channel, class T>
BNKERN_INLINE void planes_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                               std::int64_t group, std::int64_t tile, double* sum_dy, double* sum_dy_xhat) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  V sums[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  V products[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const Gradient<kind, Channel, T> gradient(part, t, k, span);
    const auto add = [&](int which, std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
      sums[which] = sums[which] + g;
      products[which] = fma(g, xhat, products[which]);
    };
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
      for (int which = 0; which < 4; ++which) add(which, i + which * kLanes, kLanes);
    for (; i + kLanes <= span.length; i += kLanes) add(0, i, kLanes);
    if (i < span.length) add(1, i, static_cast<int>(span.length - i));
  });
  *sum_dy = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  *sum_dy_xhat = sum<A>((products[0] + products[1]) + (products[2] + products[3]));
}

// Sums are arrays over the group's channels; rows are taken four at a time, so that one load and store of a sum
// serves four values.
template <ReluMask kind, class Channel, class T>
BNKERN_INLINE void rows_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                             std::int64_t group, std::int64_t tile, double* sum_dy, double* sum_dy_xhat) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using Row = Gradient<kind, Channel, T>;
  const std::int64_t channels = tile_channels(part, group, tile);
  const std::int64_t vectors = (channels + kLanes - 1) / kLanes * kLanes;
  A* const sums = zeroed_scratch<A>(2 * vectors);
  A* const products = sums + vectors;

  const auto one = [&](const Span& span) __attribute__((always_inline)) {
    const Row row(part, t, k, span);
    const auto add = [&](std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = row.xhat(i, n), g = row.g(i, xhat, n);
      (V::load(sums + i) + g).store(sums + i);
      fma(g, xhat, V::load(products + i)).store(products + i);
    };
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) add(i, kLanes);
    if (i < span.length) add(i, static_cast<int>(span.length - i));
  };
  const auto four = [&](const Span* spans) __attribute__((always_inline)) {
    const Row r0(part, t, k, spans[0]), r1(part, t, k, spans[1]), r2(part, t, k, spans[2]), r3(part, t, k, spans[3]);
    for (std::int64_t i = 0; i < channels; i += kLanes) {
      const V x0 = r0.xhat(i), x1 = r1.xhat(i), x2 = r2.xhat(i), x3 = r3.xhat(i);
      const V g0 = r0.g(i, x0), g1 = r1.g(i, x1), g2 = r2.g(i, x2), g3 = r3.g(i, x3);
      (V::load(sums + i) + ((g0 + g1) + (g2 + g3))).store(sums + i);
      const V even = fma(g2, x2, g0 * x0), odd = fma(g3, x3, g1 * x1);
      (V::load(products + i) + (even + odd)).store(products + i);
    }
  };
  Span waiting[4];
  int count = 0;
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    waiting[count++] = span;
    if (count == 4) four(waiting), count = 0;
  });
  for (int r = 0; r < count; ++r) one(waiting[r]);
  for (std::int64_t c = 0; c < channels; ++c) sum_dy[c] = sums[c], sum_dy_xhat[c] = products[c];
}

}  // namespace

template <class T>
void grad_sums_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                    std::int64_t group, std::int64_t tile, double* sum_dy, double* sum_dy_xhat) {
  using A = Accumulator<T>;
  with_gradient_kind<A>(part, t, [&]<ReluMask kind, class Channel>() __attribute__((always_inline)) {
    if constexpr (std::is_same_v<Channel, RowChannels<A>>)
      rows_tile<kind, Channel>(part, t, k, group, tile, sum_dy, sum_dy_xhat);
    else
      planes_tile<kind, Channel>(part, t, k, group, tile, sum_dy, sum_dy_xhat);
  });
}

#define BNKERN_INSTANTIATE(T)                                                                               \
  template void grad_sums_tile<T>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                  std::int64_t, std::int64_t, double*, double*);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
