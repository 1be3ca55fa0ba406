// normalize: y = act(round(weight * ((x - mean) * invstd) + bias + residual)) and the ReLU mask's bits, one
// read of x and the residual, one write of y. For a record, how many y are above zero.
#include "tiles.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class Channel, bool record, class T>
BNKERN_INLINE void normalize_spans(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                                   std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  V plane_sum = V::all(0);
  const auto look = [&](std::int64_t i, const Packed<T>& y, V one) __attribute__((always_inline)) {
    if constexpr (!record) return;
    const auto active = y.wide().positive();
    if constexpr (std::is_same_v<Channel, PlaneChannel<A>>) {
      plane_sum = plane_sum.plus_where(active, one);
    } else {
      A* const row_sum = sums[kActive] + i;
      V::load(row_sum).plus_where(active, one).store(row_sum);
    }
  };
  const bool relu = t.relu, add = bool(t.residual), save = t.mask != nullptr;
  const std::int64_t x_ahead = read_ahead<T>(part, t.x), residual_ahead = read_ahead<T>(part, t.residual);
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const T* const x = at<const T>(part, t.x, span);
    const T* const residual = add ? at<const T>(part, t.residual, span) : nullptr;
    T* const y = at<T>(part, t.y, span);
    std::uint8_t* const mask = t.mask + span.mask_byte;
    const bool past_cache = t.stream && streamable(y);
    const Channel mean(k.mean, span.c), invstd(k.invstd, span.c), weight(k.weight, span.c), bias(k.bias, span.c);

    const auto value = [&](std::int64_t i, V x, V residual, int n) __attribute__((always_inline)) {
      V z = scale_shift(standardize(x, mean[i], invstd[i]), weight[i], bias[i]);
      if (add) z = z + residual;
      const auto packed = Packed<T>::of(z);
      if (!relu) return packed;
      const auto passed = packed.above_zero();
      if (save) store_bits(mask, i, passed.bits(), n);
      return packed.keep(passed);
    };
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) {
      __builtin_prefetch(x + i + x_ahead);
      if (add) __builtin_prefetch(residual + i + residual_ahead);
      const auto packed = value(i, load(x + i), add ? load(residual + i) : V::all(0), kLanes);
      put(y + i, packed, past_cache);
      look(i, packed, V::all(1));
    }
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      const auto packed = value(i, load_some(x + i, n), add ? load_some(residual + i, n) : V::all(0), n);
      put_some(y + i, packed, n);
      look(i, packed, V::all(1).keep(first_lanes<V>(n)));
    }
  });
  if constexpr (record && std::is_same_v<Channel, PlaneChannel<A>>) *sums[kActive] = sum<A>(plane_sum);
}

}  // namespace

template <class T, bool record>
void normalize_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                    std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums) {
  using A = Accumulator<T>;
  part.shape.rows ? normalize_spans<RowChannels<A>, record>(part, t, k, group, tile, sums)
                  : normalize_spans<PlaneChannel<A>, record>(part, t, k, group, tile, sums);
}

#define BNKERN_INSTANTIATE_AS(T, record)                                                                            \
  template void normalize_tile<T, record>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                          std::int64_t, std::int64_t, Rows<Accumulator<T>>);
#define BNKERN_INSTANTIATE(T)     \
  BNKERN_INSTANTIATE_AS(T, false) \
  BNKERN_INSTANTIATE_AS(T, true)
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
