// sample_sums computes sum g and sum g * xhat of each sample and channel, for a record. It reads the tile of grad_sums
// again, which is still in cache. So the sums of grad_sums keep their bits.
#include <algorithm>

#include "gradient.h"

namespace bnkern::BNKERN_ISA {
namespace {

// One instance serves all masks. This costs a branch for each vector.
template <class Channel, class T>
using AnyGradient = Gradient<MaskSource::kAny, Channel, T>;

template <class T>
void planes_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k, std::int64_t group,
                 std::int64_t tile, const SampleSums<Accumulator<T>>& out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  for_spans(part, group, tile, [&](const Span& span) {
    const AnyGradient<PlaneChannel<A>, T> gradient(part, t, k, span);
    V sums[2] = {V::all(0), V::all(0)}, products[2] = {V::all(0), V::all(0)};
    const auto add = [&](int which, std::int64_t i, int n) __attribute__((always_inline)) {
      const V xhat = gradient.xhat(i, n), g = gradient.g(i, xhat, n);
      sums[which] = sums[which] + g;
      products[which] = fma(g, xhat, products[which]);
    };
    std::int64_t i = 0;
    for (; i + 2 * kLanes <= span.length; i += 2 * kLanes) add(0, i, kLanes), add(1, i + kLanes, kLanes);
    for (; i < span.length; i += kLanes) add(0, i, static_cast<int>(std::min<std::int64_t>(span.length - i, kLanes)));
    const std::int64_t unit = span.n * part.spans_per_plane + span.s / part.span;
    *out.of_g(unit, span.c) = sum<A>(sums[0] + sums[1]);
    *out.of_product(unit, span.c) = sum<A>(products[0] + products[1]);
  });
}

// The sums of the rows of one sample are collected for each wide channel, and added to the sample's when the next
// sample begins. A wide row with rows of several samples is added alone.
template <class T>
void rows_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k, std::int64_t group,
               std::int64_t tile, const SampleSums<Accumulator<T>>& out) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using Row = AnyGradient<RowChannels<A>, T>;
  const std::int64_t channels = tile_channels(part, group, tile), c0 = group * part.group;
  const std::int64_t vectors = (channels + kLanes - 1) / kLanes * kLanes;
  A* const sums = zeroed_scratch<A>(2 * vectors);
  A* const products = sums + vectors;
  const std::int64_t step = part.width == part.shape.c ? channels : part.shape.c;  // between the rows of a wide row
  const std::int64_t rows = part.width / part.shape.c;                             // in a wide row

  const auto add_row = [&](const Span& span) {
    const Row row(part, t, k, span);
    for (std::int64_t i = 0; i < span.length; i += kLanes) {
      const int n = static_cast<int>(std::min<std::int64_t>(span.length - i, kLanes));
      const V xhat = row.xhat(i, n), g = row.g(i, xhat, n);
      (V::load(sums + i) + g).store(sums + i);
      fma(g, xhat, V::load(products + i)).store(products + i);
    }
  };
  const auto add_four_rows = [&](const Span* spans) {
    const Row r0(part, t, k, spans[0]), r1(part, t, k, spans[1]), r2(part, t, k, spans[2]), r3(part, t, k, spans[3]);
    for (std::int64_t i = 0; i < channels; i += kLanes) {
      const V x0 = r0.xhat(i), x1 = r1.xhat(i), x2 = r2.xhat(i), x3 = r3.xhat(i);
      const V g0 = r0.g(i, x0), g1 = r1.g(i, x1), g2 = r2.g(i, x2), g3 = r3.g(i, x3);
      (V::load(sums + i) + ((g0 + g1) + (g2 + g3))).store(sums + i);
      (V::load(products + i) + (fma(g2, x2, g0 * x0) + fma(g3, x3, g1 * x1))).store(products + i);
    }
  };

  Span waiting[4];
  int count = 0;
  std::int64_t current = -1;  // the sample of the collected rows
  // Adds row j of the collected wide row to a sample.
  const auto give = [&](std::int64_t j, std::int64_t sample) {
    A *const of_g = out.of_g(tile + sample, c0), *const of_product = out.of_product(tile + sample, c0);
    for (std::int64_t c = 0; c < step; ++c) of_g[c] += sums[j * step + c], of_product[c] += products[j * step + c];
  };
  const auto close = [&] {
    for (int r = 0; r < count; ++r) add_row(waiting[r]);
    count = 0;
    if (current < 0) return;
    for (std::int64_t j = 0; j * step < channels; ++j) give(j, current);
    std::memset(sums, 0, 2 * vectors * sizeof(A));
    current = -1;
  };
  for_spans(part, group, tile, [&](const Span& span) {
    const std::int64_t first = span.n * rows, last = first + span.length / step - 1;
    const std::int64_t sample = first / part.shape.s;
    if (sample != current) close();
    if (sample == last / part.shape.s) {
      current = sample;
      waiting[count++] = span;
      if (count == 4 && channels % kLanes == 0) add_four_rows(waiting), count = 0;
      if (count == 4) {
        for (const Span& one : waiting) add_row(one);
        count = 0;
      }
    } else {
      close();
      add_row(span);
      for (std::int64_t j = 0; j * step < span.length; ++j) give(j, (first + j) / part.shape.s);
      std::memset(sums, 0, 2 * vectors * sizeof(A));
    }
  });
  close();
}

}  // namespace

template <class T>
void sample_sums_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                      std::int64_t group, std::int64_t tile, const SampleSums<Accumulator<T>>& out) {
  part.shape.rows ? rows_tile(part, t, k, group, tile, out) : planes_tile(part, t, k, group, tile, out);
}

#define BNKERN_INSTANTIATE(T)                                                                                 \
  template void sample_sums_tile<T>(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, \
                                    std::int64_t, std::int64_t, const SampleSums<Accumulator<T>>&);
BNKERN_FOR_STORAGE_TYPES(BNKERN_INSTANTIATE)

}  // namespace bnkern::BNKERN_ISA
