// Computes g, the gradient before the activation, for grad_sums and grad_input.
#pragma once

#include "activation.h"
#include "tiles.h"

namespace bnkern::BNKERN_ISA {

// The source of the mask of positive z. With kAny it is chosen at run time.
enum class MaskSource { kNone, kSaved, kRecomputed, kAny };

// g and xhat of the n lanes from element i of a span. If n < 16, the other lanes are zero.
template <MaskSource source, class Channel, class T>
struct Gradient {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const T *dy, *x;
  const std::uint8_t* mask;
  Activation act;
  std::int64_t dy_ahead, x_ahead;
  Channel mean, invstd, weight, bias;

  BNKERN_INLINE Gradient(const Partition& part, const Tensors<T>& t, const Coefficients<A>& k, const Span& span)
      : dy(at<const T>(part, t.dy, span)),
        x(at<const T>(part, t.x, span)),
        mask(t.mask ? t.mask + span.mask_byte : nullptr),
        act(t.act),
        dy_ahead(read_ahead<T>(part, t.dy)),
        x_ahead(read_ahead<T>(part, t.x)),
        mean(k.mean, span.c),
        invstd(k.invstd, span.c),
        weight(k.weight, span.c),
        bias(k.bias, span.c) {}

  BNKERN_INLINE V xhat(std::int64_t i, int n = kLanes) const {
    __builtin_prefetch(x + i + x_ahead);
    if (n == kLanes) return standardize(load(x + i), mean[i], invstd[i]);
    // The other lanes are cleared, because (0 - mean) * invstd may overflow.
    return standardize(load_some(x + i, n), mean[i], invstd[i]).keep(first_lanes<V>(n));
  }
  BNKERN_INLINE V g(std::int64_t i, V xhat, int n = kLanes) const {
    __builtin_prefetch(dy + i + dy_ahead);
    return before_activation(i, xhat, n, n == kLanes ? load(dy + i) : load_some(dy + i, n));
  }
  // g as it is stored. With ReLU its values are values of dy or zero, so they need no rounding.
  BNKERN_INLINE Packed<T> stored_g(std::int64_t i, V xhat) const {
    __builtin_prefetch(dy + i + dy_ahead);
    return before_activation(i, xhat, kLanes, Packed<T>::read(dy + i));
  }

 private:
  template <class Lanes>
  BNKERN_INLINE Lanes before_activation(std::int64_t i, V xhat, int n, Lanes g) const {
    const bool any = source == MaskSource::kAny && act != Activation::none;
    if (source == MaskSource::kSaved || (any && mask))
      return activate(act, g, V::Mask::from_bits(load_bits(mask, i, n)));
    if (source == MaskSource::kRecomputed || any)
      return activate(act, g, Packed<T>::of(scale_shift(xhat, weight[i], bias[i])).above_zero());
    return g;
  }
};

// Calls f.template operator()<MaskSource, Channel>() for this call's mask and layout. If a vector has several parts of
// the compiler's types, one instance serves all masks. This costs a branch for each vector.
template <class A, class T, class F>
BNKERN_INLINE void with_mask_source(const Partition& part, const Tensors<T>& t, F f) {
  const auto with_channel = [&]<class Channel>() __attribute__((always_inline)) {
    if constexpr (kArrayVec<A>) {
      f.template operator()<MaskSource::kAny, Channel>();
    } else {
      if (t.act == Activation::none) return f.template operator()<MaskSource::kNone, Channel>();
      t.mask ? f.template operator()<MaskSource::kSaved, Channel>()
             : f.template operator()<MaskSource::kRecomputed, Channel>();
    }
  };
  part.shape.rows ? with_channel.template operator()<RowChannels<A>>()
                  : with_channel.template operator()<PlaneChannel<A>>();
}

}  // namespace bnkern::BNKERN_ISA
