// grad_input computes dx = weight * invstd * (g - sum g / M - xhat * sum g xhat / M), or weight * invstd * g in eval
// mode, and the gradient g of the residual. It reads dy and x once, and writes each result once. For a record it also
// computes sums of dx and the numbers of its positive, negative and zero values, all of dx as stored. backward.cpp
// counts the values that are infinite or NaN, if the sums show that there are some.
#include "gradient.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class A>
struct InputSums : Sums<A, kRecordedGradInputRows> {
  using V = Vec<A>;
  BNKERN_INLINE void add(V dx, V one) {
    V* const row = this->row;
    row[kDxSum] = row[kDxSum] + dx;
    row[kDxAbsSum] = row[kDxAbsSum] + dx.magnitude();
    row[kDxSquareSum] = fma(dx, dx, row[kDxSquareSum]);
    row[kDxPositive] = row[kDxPositive].plus_where_positive(dx, one);
    row[kDxNegative] = row[kDxNegative].plus_where_negative(dx, one);
    row[kDxZero] = row[kDxZero].plus_where_zero(dx, one);
  }
};

// One span of all tensors that the phase reads and writes.
template <MaskSource source, class Channel, class T>
struct InputSpan {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const Gradient<source, Channel, T> gradient;
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

  BNKERN_INLINE Packed<T> write(std::int64_t i) const {
    const V xhat = gradient.xhat(i);
    const Packed<T> g = gradient.stored_g(i, xhat);
    const auto packed = Packed<T>::of(input(i, xhat, g.wide()));
    if (dx) put(dx + i, packed, past_cache);
    if (dresidual) put(dresidual + i, g, past_cache);
    return packed;
  }
  BNKERN_INLINE Packed<T> write_some(std::int64_t i, int n) const {
    const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
    const auto packed = Packed<T>::of(input(i, xhat, g));
    if (dx) put_some(dx + i, packed, n);
    if (dresidual) put_some(dresidual + i, Packed<T>::of(g), n);
    return packed;
  }

 private:
  BNKERN_INLINE V input(std::int64_t i, V xhat, V g) const {
    return training ? input_gradient(g, xhat, mean_dy[i], mean_dy_xhat[i], scale[i]) : g * scale[i];
  }
};

}  // namespace

template <class T, bool record>
void grad_input_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                     std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums) {
  using A = Accumulator<T>;
  if constexpr (record && kArrayVec<A>) {
    grad_input_tile<T, false>(part, t, k, group, tile, sums);
    second_look_at<T, InputSums<A>>(part, t.dx, group, tile, sums);
  } else {
    with_mask_source<A>(part, t, [&]<MaskSource source, class Channel>() __attribute__((always_inline)) {
      constexpr bool rows = std::is_same_v<Channel, RowChannels<A>>;
      write_tile<InputSpan<source, Channel, T>, InputSums<A>, rows, record>(part, t, k, t.dx, group, tile, sums);
    });
  }
}

#define BNKERN_INSTANTIATE_AS(T, record)                                                                             \
  template void grad_input_tile<T, record>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                           std::int64_t, std::int64_t, Rows<Accumulator<T>>);
#define BNKERN_INSTANTIATE(T)     \
  BNKERN_INSTANTIATE_AS(T, false) \
  BNKERN_INSTANTIATE_AS(T, true)
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
