// What grad_sums and grad_input share: g, the incoming gradient where the forward's ReLU let the value pass.
#pragma once

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

enum class ReluMask { kNone, kSaved, kRecomputed, kAny };  // kAny: told at run time

// g and xhat at element i of a span; n lanes of them where n < 16, zeros in the others.
template <ReluMask kind, class Channel, class T>
struct Gradient {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const T *dy, *x;
  const std::uint8_t* mask;
  bool relu;
  std::int64_t dy_ahead, x_ahead;
  Channel mean, invstd, weight, bias;

  BNKERN_INLINE Gradient(const Partition& part, const Tensors<T>& t, const Coefficients<A>& k, const Span& span)
      : dy(at<const T>(part, t.dy, span)),
        x(at<const T>(part, t.x, span)),
        mask(t.mask ? t.mask + span.mask_byte : nullptr),
        relu(t.relu),
        dy_ahead(read_ahead<T>(part, t.dy)),
        x_ahead(read_ahead<T>(part, t.x)),
        mean(k.mean, span.c),
        invstd(k.invstd, span.c),
        weight(k.weight, span.c),
        bias(k.bias, span.c) {}

  BNKERN_INLINE V xhat(std::int64_t i, int n = kLanes) const {
    __builtin_prefetch(x + i + x_ahead);
    if (n == kLanes) return standardize(load(x + i), mean[i], invstd[i]);
    return standardize(load_some(x + i, n), mean[i], invstd[i]).keep(first_lanes<V>(n));  // -mean * invstd may overflow
  }
  BNKERN_INLINE V g(std::int64_t i, V xhat, int n = kLanes) const {
    __builtin_prefetch(dy + i + dy_ahead);
    return passed(i, xhat, n, n == kLanes ? load(dy + i) : load_some(dy + i, n));
  }
  // The same as stored: values of dy and zeros, which need no rounding.
  BNKERN_INLINE Packed<T> stored_g(std::int64_t i, V xhat) const {
    __builtin_prefetch(dy + i + dy_ahead);
    return passed(i, xhat, kLanes, Packed<T>::read(dy + i));
  }

 private:
  template <class Lanes>
  BNKERN_INLINE Lanes passed(std::int64_t i, V xhat, int n, Lanes g) const {
    const bool saved = kind == ReluMask::kSaved || (kind == ReluMask::kAny && relu && mask);
    const bool recomputed = kind == ReluMask::kRecomputed || (kind == ReluMask::kAny && relu && !mask);
    if (saved) g = g.keep(V::Mask::from_bits(load_bits(mask, i, n)));
    if (recomputed) {
      const V z = scale_shift(xhat, weight[i], bias[i]);
      g = g.keep(Packed<T>::of(z).above_zero());
    }
    return g;
  }
};

// Calls f.template operator()<ReluMask, Channel>() for this call's kind of mask and of layout.
template <class A, class T, class F>
BNKERN_INLINE void with_gradient_kind(const Partition& part, const Tensors<T>& t, F f) {
  const auto with_channel = [&]<class Channel>() __attribute__((always_inline)) {
    if constexpr (kArrayVec<A>) {
      f.template operator()<ReluMask::kAny, Channel>();
    } else {
      if (!t.relu) return f.template operator()<ReluMask::kNone, Channel>();
      t.mask ? f.template operator()<ReluMask::kSaved, Channel>()
             : f.template operator()<ReluMask::kRecomputed, Channel>();
    }
  };
  part.shape.rows ? with_channel.template operator()<RowChannels<A>>()
                  : with_channel.template operator()<PlaneChannel<A>>();
}

}  // namespace bnkern::BNKERN_ISA
