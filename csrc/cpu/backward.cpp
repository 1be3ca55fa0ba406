// grad_sums and grad_input over all tiles, and the coefficients between them.
#include "cpu.h"
#include "drive.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class T>
void backward_as(const Backward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.dy, p.shape) && gapless(p.x, p.shape) && gapless(p.dx, p.shape) &&
                     gapless(p.dresidual, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;
  const double count = static_cast<double>(part.count());

  Workspace space(7 * Workspace::bytes<A>(part.width) + 3 * Workspace::bytes<double>(kMostRows * part.width));
  Coefficients<A> k{};
  for (A** array : {&k.mean, &k.invstd, &k.weight, &k.bias, &k.mean_dy, &k.mean_dy_xhat, &k.scale})
    *array = space.take<A>(part.width);
  const bool record_affine = p.record_affine && p.sums, record_gradient = p.record_gradient && p.dx;
  const Given measured = make_room(space, p.sums ? kGradSumsRows : 0, part.width);
  const Given measured_sums = make_room(space, record_affine ? kRecordedGradSumsRows : 0, part.width);
  const Given applied_sums = make_room(space, record_gradient ? kRecordedGradInputRows : 0, part.width);

  Tensors<T> t{};
  t.x = p.x, t.dy = p.dy, t.dx = p.dx, t.dresidual = p.dresidual;
  t.mask = const_cast<std::uint8_t*>(p.mask), t.relu = p.relu, t.training = p.training;
  t.stream = elements * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;

  A* const sums = static_cast<A*>(p.sum_dy);
  A* const products = static_cast<A*>(p.sum_dy_xhat);
  const auto means_of_sums = [&](const Columns& columns, double sum, double product) {
    set_all(k.mean_dy, columns, static_cast<A>(sum / count));
    set_all(k.mean_dy_xhat, columns, static_cast<A>(product / count));
  };
  for (std::int64_t group = 0; group < part.groups; ++group)
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      const A invstd = p.invstd ? static_cast<const A*>(p.invstd)[c] : A(1), weight = read(p.weight, c, A(1));
      set_all(k.mean, columns, p.mean ? static_cast<const A*>(p.mean)[c] : A(0));
      set_all(k.invstd, columns, invstd);
      set_all(k.weight, columns, weight);
      set_all(k.bias, columns, read(p.bias, c, A(0)));
      set_all(k.scale, columns, weight * invstd);
      if (!p.sums && p.training) means_of_sums(columns, sums[c], products[c]);
    });
  const auto grad_sums = record_affine ? grad_sums_tile<T, true> : grad_sums_tile<T, false>;
  const auto grad_input = record_gradient ? grad_input_tile<T, true> : grad_input_tile<T, false>;
  run<A>(
      part, 2 * sizeof(T), p.input, p.threads, measured, measured_sums, applied_sums,
      [&](std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
        grad_sums(part, t, k, group, tile, out, sums);
      },
      [&](std::int64_t channels, double, const Rows<double>& total, double, const Rows<double>& tile) {
        join_sums(measured.rows, channels, total, tile);
      },
      [&](std::int64_t group) {
        for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
          const double sum = add_up(measured.totals[kSumDy], columns);
          const double product = add_up(measured.totals[kSumDyXhat], columns);
          if (sums) sums[c] = static_cast<A>(sum);
          if (products) products[c] = static_cast<A>(product);
          if (p.dbias) write(p.dbias, c, sum);
          if (p.dweight) write(p.dweight, c, product);
          means_of_sums(columns, sum, product);
          if (!record_affine) return;
          const auto total = [&](int r) { return add_up(measured_sums.totals[r], columns); };
          write_record(p.record_affine, p.shape.c, c,
                       {sum, total(kOfDy + kAbsSum), total(kOfDy + kSignSum), count - total(kOfDy + kZeros), product,
                        total(kOfDyXhat + kAbsSum), total(kOfDyXhat + kSignSum), count - total(kOfDyXhat + kZeros)});
        });
      },
      [&](std::int64_t group, std::int64_t tile, const Rows<A>& sums) { grad_input(part, t, k, group, tile, sums); },
      [&](std::int64_t group) {
        if (!record_gradient) return;
        for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
          const auto total = [&](int r) { return add_up(applied_sums.totals[r], columns); };
          write_record(p.record_gradient, p.shape.c, c,
                       {count, total(kDxSum), total(kDxAbsSum), total(kDxSquareSum), total(kDxPositive),
                        total(kDxNegative), total(kDxZero)});
        });
      });
}

}  // namespace

void backward(const Backward& p) {
  with_dtype(p.dtype, [&](auto* t) { backward_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
