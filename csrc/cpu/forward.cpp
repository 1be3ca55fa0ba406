// moments and normalize over all tiles: how partial moments are joined, and the coefficients made of them.
#include <cmath>
#include <limits>

#include "cpu.h"
#include "drive.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kActiveRow = 7;  // of a record; the others are written from the first on

// Joins a tile's (mean, M2) to those of the tiles before it.
void join_moments(std::int64_t channels, double before, const Rows<double>& total, double count,
                  const Rows<double>& tile) {
  if (before == 0) {
    std::memcpy(total[kMean], tile[kMean], channels * sizeof(double));
    std::memcpy(total[kM2], tile[kM2], channels * sizeof(double));
    return;
  }
  // chan_merge with its ratio of counts, the same for all channels, taken out of the loop.
  const double share = count / (before + count), weight = before * share;
  for (std::int64_t c = 0; c < channels; ++c) {
    chan_join(&total[kMean][c], &total[kM2][c], tile[kMean][c], tile[kM2][c], share, weight);
  }
}

// The rows that a record has besides, before join_moments() changes mean and M2.
void join_higher(std::int64_t channels, double before, const Rows<double>& total, double count,
                 const Rows<double>& tile) {
  if (before == 0) {
    for (const int r : {kM3, kM4, kMin, kMax}) std::memcpy(total[r], tile[r], channels * sizeof(double));
    return;
  }
  const double *const mean = total[kMean], *const m2 = total[kM2];
  const double *const tile_mean = tile[kMean], *const tile_m2 = tile[kM2];
  const double *const tile_m3 = tile[kM3], *const tile_m4 = tile[kM4];
  double *const m3 = total[kM3], *const m4 = total[kM4];
#pragma GCC ivdep
  for (std::int64_t c = 0; c < channels; ++c) {
    const HigherMoments<double> both =
        pebay_merge(Moments<double>{before, mean[c], m2[c]}, HigherMoments<double>{m3[c], m4[c]},
                    Moments<double>{count, tile_mean[c], tile_m2[c]}, HigherMoments<double>{tile_m3[c], tile_m4[c]});
    m3[c] = both.m3, m4[c] = both.m4;
  }
  for (std::int64_t c = 0; c < channels; ++c) total[kMin][c] = least(tile[kMin][c], total[kMin][c]);
  for (std::int64_t c = 0; c < channels; ++c) total[kMax][c] = largest(tile[kMax][c], total[kMax][c]);
}

// How many values wide channel v saw.
double values_of(const Partition& part, std::int64_t v) {
  if (!part.shape.rows) return static_cast<double>(part.count());
  return static_cast<double>(part.rows + (v < part.leftover));
}

template <class T>
void forward_as(const Forward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.x, p.shape) && gapless(p.residual, p.shape) && gapless(p.y, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;

  // A record's moments ride in the phase moments; where that does not run they are taken of a tile right before it is
  // normalised, which then counts as measuring.
  const bool record = p.record != nullptr, as_one = record && !p.moments;
  Workspace space(4 * Workspace::bytes<A>(part.width) + 3 * Workspace::bytes<double>(kMostRows * part.width));
  Coefficients<A> k{};
  k.mean = space.take<A>(part.width);
  k.invstd = space.take<A>(part.width);
  k.weight = space.take<A>(part.width);
  k.bias = space.take<A>(part.width);
  const Given measured = make_room(space, record ? kRecordedMomentsRows : p.moments ? kMomentsRows : 0, part.width);
  const Given measured_sums = make_room(space, as_one ? kRecordedNormalizeRows : 0, part.width);
  const Given applied_sums = make_room(space, record && !as_one ? kRecordedNormalizeRows : 0, part.width);

  Tensors<T> t{};
  t.x = p.x, t.residual = p.residual, t.y = p.y, t.mask = p.mask, t.relu = p.relu;
  t.stream = elements * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;

  if (p.counter && p.moments) ++*p.counter;
  const double momentum = p.cumulative && p.counter ? 1.0 / static_cast<double>(*p.counter) : p.momentum;
  A* const means = static_cast<A*>(p.mean);
  A* const spreads = static_cast<A*>(p.spread);

  const auto coefficients = [&](std::int64_t c, const Columns& columns) {
    set_all(k.mean, columns, means ? means[c] : A(0));
    set_all(k.invstd, columns, spreads ? spreads[c] : A(1));
    set_all(k.weight, columns, read(p.weight, c, A(1)));
    set_all(k.bias, columns, read(p.bias, c, A(0)));
  };
  const auto record_active = [&](std::int64_t group, const Given& sums) {
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      p.record[kActiveRow * p.shape.c + c] = add_up(sums.totals[kActive], columns);
    });
  };
  const auto finish = [&](std::int64_t group) {
    const Rows<double>& totals = measured.totals;
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      Moments<double> all{0, 0, 0};
      HigherMoments<double> higher{0, 0};
      double low = kInfinity, high = -kInfinity;
      for (std::int64_t v = columns.first; v < columns.end; v += columns.step) {
        const Moments<double> some{values_of(part, v), totals[kMean][v], totals[kM2][v]};
        if (record && some.count > 0) {
          higher = pebay_merge(all, higher, some, HigherMoments<double>{totals[kM3][v], totals[kM4][v]});
          low = least(low, totals[kMin][v]), high = largest(high, totals[kMax][v]);
        }
        all = chan_merge(all, some);
      }
      const double m2 = all.m2 < 0 ? 0 : all.m2;  // rounding only; NaN stays
      if (record) {
        const double m4 = higher.m4 < 0 ? 0 : higher.m4;
        write_record(p.record, p.shape.c, c, {all.count, all.mean, m2, higher.m3, m4, low, high});
      }
      if (!p.moments) return;
      means[c] = static_cast<A>(all.mean);
      spreads[c] = static_cast<A>(p.normalize ? 1 / std::sqrt(m2 / all.count + p.eps) : m2);
      if (p.running_mean) {
        const double mean = read(p.running_mean, c, 0.0), var = read(p.running_var, c, 0.0);
        write(p.running_mean, c, mean * (1 - momentum) + all.mean * momentum);
        write(p.running_var, c, var * (1 - momentum) + m2 / (all.count - 1) * momentum);
      }
      if (p.normalize) coefficients(c, columns);
    });
    if (as_one) record_active(group, measured_sums);
  };
  if (!p.moments) {
    for (std::int64_t group = 0; group < part.groups; ++group)
      for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
        if (p.running_mean) {
          means[c] = static_cast<A>(read(p.running_mean, c, 0.0));
          spreads[c] = static_cast<A>(1 / std::sqrt(read(p.running_var, c, 0.0) + p.eps));
        }
        coefficients(c, columns);
      });
  }
  const auto take_moments = record ? moments_tile<T, true> : moments_tile<T, false>;
  const auto normalize = record ? normalize_tile<T, true> : normalize_tile<T, false>;
  run<A>(
      part, sizeof(T), p.normalize && !as_one, p.threads, measured, measured_sums, applied_sums,
      [&](std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
        take_moments(part, p.x, group, tile, out);
        if (as_one) normalize(part, t, k, group, tile, sums);
      },
      [&](std::int64_t channels, double before, const Rows<double>& total, double count, const Rows<double>& tile) {
        if (record) join_higher(channels, before, total, count, tile);
        join_moments(channels, before, total, count, tile);
      },
      finish,
      [&](std::int64_t group, std::int64_t tile, const Rows<A>& sums) { normalize(part, t, k, group, tile, sums); },
      [&](std::int64_t group) {
        if (applied_sums.rows) record_active(group, applied_sums);
      });
}

}  // namespace

void forward(const Forward& p) {
  with_dtype(p.dtype, [&](auto* t) { forward_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
