// grad_sums: sum g and sum g * xhat per channel, the gradients of bias and weight. One read of dy and x.
#include "gradient.h"

namespace bnkern::BNKERN_ISA {

template <class T>
void grad_sums_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                    std::int64_t group, std::int64_t tile, double* sum_dy, double* sum_dy_xhat) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  if (part.shape.rows) {
    const std::int64_t channels = tile_channels(part, group, tile);
    const std::int64_t vectors = (channels + kLanes - 1) / kLanes * kLanes;
    A* const sums = zeroed_scratch<A>(2 * vectors);
    A* const products = sums + vectors;
    for_gradients<T>(part, t, k, group, tile, [&](const auto& gradient, const Span& span) {
      std::int64_t i = 0;
      for (; i + kLanes <= span.length; i += kLanes) {
        const V xhat = gradient.xhat(i), g = gradient.g(i, xhat);
        (V::load(sums + i) + g).store(sums + i);
        fma(g, xhat, V::load(products + i)).store(products + i);
      }
      if (i < span.length) {
        const int n = static_cast<int>(span.length - i);
        const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
        (V::load(sums + i) + g).store(sums + i);
        fma(g, xhat, V::load(products + i)).store(products + i);
      }
    });
    for (std::int64_t c = 0; c < channels; ++c) sum_dy[c] = sums[c], sum_dy_xhat[c] = products[c];
  } else {
    V sums[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    V products[4] = {V::all(0), V::all(0), V::all(0), V::all(0)};
    for_gradients<T>(part, t, k, group, tile,
                     [&](const auto& gradient, const Span& span) __attribute__((always_inline)) {
                       const auto add = [&](int k, std::int64_t i, int n) __attribute__((always_inline)) {
                         const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
                         sums[k] = sums[k] + g;
                         products[k] = fma(g, xhat, products[k]);
                       };
                       std::int64_t i = 0;
                       for (; i + 4 * kLanes <= span.length; i += 4 * kLanes)
                         for (int k = 0; k < 4; ++k) {
                           prefetch_next_plane(gradient.dy + i + k * kLanes, t.dy.outer);
                           prefetch_next_plane(gradient.x + i + k * kLanes, t.x.outer);
                           add(k, i + k * kLanes, kLanes);
                         }
                       for (; i + kLanes <= span.length; i += kLanes) add(0, i, kLanes);
                       if (i < span.length) add(1, i, static_cast<int>(span.length - i));
                     });
    *sum_dy = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    *sum_dy_xhat = sum<A>((products[0] + products[1]) + (products[2] + products[3]));
  }
}

#define BNKERN_INSTANTIATE(T)                                                                               \
  template void grad_sums_tile<T>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                  std::int64_t, std::int64_t, double*, double*);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
