// normalize computes y = act(round(weight * ((x - mean) * invstd) + bias + residual)) and the bits of the mask. It
// reads x and the residual once, and writes y once. For a record it also counts the values of y above zero.
#include "activation.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class A>
struct OutputSums : Sums<A, kRecordedNormalizeRows> {
  using V = Vec<A>;
  BNKERN_INLINE void add(V y, V one) { this->row[kActive] = this->row[kActive].plus_where_positive(y, one); }
};

// One span of all tensors that the phase reads and writes.
template <class Channel, class T>
struct OutputSpan {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const Activation act;
  const bool add, save;
  const T *const x, *const residual;
  T* const y;
  std::uint8_t* const mask;
  const bool past_cache;
  const std::int64_t x_ahead, residual_ahead;
  const Channel mean, invstd, weight, bias;

  BNKERN_INLINE OutputSpan(const Partition& part, const Tensors<T>& t, const Coefficients<A>& k, const Span& span)
      : act(t.act),
        add(bool(t.residual)),
        save(t.mask != nullptr),
        x(at<const T>(part, t.x, span)),
        residual(add ? at<const T>(part, t.residual, span) : nullptr),
        y(at<T>(part, t.y, span)),
        mask(t.mask + span.mask_byte),
        past_cache(t.stream && streamable(y)),
        x_ahead(read_ahead<T>(part, t.x)),
        residual_ahead(read_ahead<T>(part, t.residual)),
        mean(k.mean, span.c),
        invstd(k.invstd, span.c),
        weight(k.weight, span.c),
        bias(k.bias, span.c) {}

  BNKERN_INLINE Packed<T> write(std::int64_t i) const {
    __builtin_prefetch(x + i + x_ahead);
    if (add) __builtin_prefetch(residual + i + residual_ahead);
    const auto packed = value(i, load(x + i), add ? load(residual + i) : V::all(0), kLanes);
    put(y + i, packed, past_cache);
    return packed;
  }
  BNKERN_INLINE Packed<T> write_some(std::int64_t i, int n) const {
    const auto packed = value(i, load_some(x + i, n), add ? load_some(residual + i, n) : V::all(0), n);
    put_some(y + i, packed, n);
    return packed;
  }

 private:
  BNKERN_INLINE Packed<T> value(std::int64_t i, V x, V residual, int n) const {
    V z = scale_shift(standardize(x, mean[i], invstd[i]), weight[i], bias[i]);
    if (add) z = z + residual;
    const auto packed = Packed<T>::of(z);
    if (act == Activation::none) return packed;
    const auto positive = packed.above_zero();
    if (save) store_bits(mask, i, positive.bits(), n);
    return activate(act, packed, positive);
  }
};

}  // namespace

template <class T, bool record>
void normalize_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                    std::int64_t group, std::int64_t tile, Rows<Accumulator<T>> sums) {
  using A = Accumulator<T>;
  if constexpr (record && kArrayVec<A>) {
    normalize_tile<T, false>(part, t, k, group, tile, sums);
    second_look_at<T, OutputSums<A>>(part, t.y, group, tile, sums);
  } else {
    part.shape.rows
        ? write_tile<OutputSpan<RowChannels<A>, T>, OutputSums<A>, true, record>(part, t, k, t.y, group, tile, sums)
        : write_tile<OutputSpan<PlaneChannel<A>, T>, OutputSums<A>, false, record>(part, t, k, t.y, group, tile, sums);
  }
}

#define BNKERN_INSTANTIATE_AS(T, record)                                                                            \
  template void normalize_tile<T, record>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                          std::int64_t, std::int64_t, Rows<Accumulator<T>>);
#define BNKERN_INSTANTIATE(T)     \
  BNKERN_INSTANTIATE_AS(T, false) \
  BNKERN_INSTANTIATE_AS(T, true)
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
