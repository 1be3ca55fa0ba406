// What grad_sums and grad_input share: g, the incoming gradient where the forward's ReLU let the value pass.
#pragma once

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

enum class ReluMask { kNone, kSaved, kRecomputed };

// g and xhat at element i of a span; n lanes of them where n < 16, the others zero in g.
template <ReluMask kind, class Channel, class T>
struct Gradient {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const T *dy, *x;
  const std::uint8_t* mask;
  Channel mean, invstd, weight, bias;

  BNKERN_INLINE Gradient(const Partition& part, const Tensors<T>& t, const Coefficients<A>& k, const Span& span)
      : dy(at<const T>(part, t.dy, span)),
        x(at<const T>(part, t.x, span)),
        mask(t.mask + span.mask_byte),
        mean(k.mean, span.c),
        invstd(k.invstd, span.c),
        weight(k.weight, span.c),
        bias(k.bias, span.c) {}

  BNKERN_INLINE V xhat(std::int64_t i, int n = kLanes) const {
    return standardize(n == kLanes ? load(x + i) : load_some(x + i, n), mean[i], invstd[i]);
  }
  BNKERN_INLINE V g(std::int64_t i, V xhat, int n = kLanes) const {
    V g = n == kLanes ? load(dy + i) : load_some(dy + i, n);
    if constexpr (kind == ReluMask::kSaved) g = g.keep(V::Mask::from_bits(load_bits(mask, i, n)));
    if constexpr (kind == ReluMask::kRecomputed) {
      const V z = scale_shift(xhat, weight[i], bias[i]);
      g = g.keep(Packed<T>::of(z).above_zero());
    }
    return g;
  }
};

// Calls f(Gradient, span) for each span of a tile, with the kind of mask and of layout made static.
template <class T, class F>
BNKERN_INLINE void for_gradients(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                                 std::int64_t group, std::int64_t tile, F f) {
  using A = Accumulator<T>;
  const auto run = [&]<ReluMask kind, class Channel>() __attribute__((always_inline)) {
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
      f(Gradient<kind, Channel, T>(part, t, k, span), span);
    });
  };
  const ReluMask kind = !t.relu ? ReluMask::kNone : t.mask ? ReluMask::kSaved : ReluMask::kRecomputed;
  if (part.shape.rows) {
    switch (kind) {
      case ReluMask::kNone:
        return run.template operator()<ReluMask::kNone, RowChannels<A>>();
      case ReluMask::kSaved:
        return run.template operator()<ReluMask::kSaved, RowChannels<A>>();
      case ReluMask::kRecomputed:
        return run.template operator()<ReluMask::kRecomputed, RowChannels<A>>();
    }
  }
  switch (kind) {
    case ReluMask::kNone:
      return run.template operator()<ReluMask::kNone, PlaneChannel<A>>();
    case ReluMask::kSaved:
      return run.template operator()<ReluMask::kSaved, PlaneChannel<A>>();
    case ReluMask::kRecomputed:
      return run.template operator()<ReluMask::kRecomputed, PlaneChannel<A>>();
  }
}

}  // namespace bnkern::BNKERN_ISA
