// grad_input: dx = weight * invstd * (g - sum g / M - xhat * sum g xhat / M), or weight * invstd * g in eval
// mode, and the residual's gradient g. One read of dy and x, one write each.
#include "gradient.h"

namespace bnkern::BNKERN_ISA {

template <class T>
void grad_input_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                     std::int64_t group, std::int64_t tile) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const bool training = t.training, want_dx = bool(t.dx), want_dresidual = bool(t.dresidual);
  with_gradient_kind<A>(part, t, [&]<ReluMask kind, class Channel>() __attribute__((always_inline)) {
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
      const Gradient<kind, Channel, T> gradient(part, t, k, span);
      T* const dx = want_dx ? at<T>(part, t.dx, span) : nullptr;
      T* const dresidual = want_dresidual ? at<T>(part, t.dresidual, span) : nullptr;
      const bool past_cache = t.stream && streamable(dx) && streamable(dresidual);
      const Channel mean_dy(k.mean_dy, span.c), mean_dy_xhat(k.mean_dy_xhat, span.c), scale(k.scale, span.c);

      const auto input = [&](std::int64_t i, V xhat, V g) __attribute__((always_inline)) {
        return training ? input_gradient(g, xhat, mean_dy[i], mean_dy_xhat[i], scale[i]) : g * scale[i];
      };
      std::int64_t i = 0;
      for (; i + kLanes <= span.length; i += kLanes) {
        const V xhat = gradient.xhat(i), g = gradient.g(i, xhat);
        if (want_dx) put(dx + i, Packed<T>::of(input(i, xhat, g)), past_cache);
        if (want_dresidual) put(dresidual + i, Packed<T>::of(g), past_cache);
      }
      if (i < span.length) {
        const int n = static_cast<int>(span.length - i);
        const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
        if (want_dx) put_some(dx + i, Packed<T>::of(input(i, xhat, g)), n);
        if (want_dresidual) put_some(dresidual + i, Packed<T>::of(g), n);
      }
    });
  });
}

#define BNKERN_INSTANTIATE(T)                                                                                \
  template void grad_input_tile<T>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                   std::int64_t, std::int64_t);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
