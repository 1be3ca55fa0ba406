// The statistics of a batch: joins of the moments of tiles, and the update of running statistics and counters.
#pragma once

#include <cmath>
#include <limits>

#include "drive.h"

namespace bnkern::BNKERN_ISA {

// Joins (mean, M2) of a tile to those of the previous tiles.
inline void join_moments(std::int64_t channels, double before, const Rows<double>& total, double count,
                         const Rows<double>& tile) {
  if (before == 0) {
    std::memcpy(total[kMean], tile[kMean], channels * sizeof(double));
    std::memcpy(total[kM2], tile[kM2], channels * sizeof(double));
    return;
  }
  // The formula of chan_merge. The ratio of counts is the same for all channels, so it is computed before the loop.
  const double share = count / (before + count), weight = before * share;
  for (std::int64_t c = 0; c < channels; ++c) {
    chan_join(&total[kMean][c], &total[kM2][c], tile[kMean][c], tile[kM2][c], share, weight);
  }
}

// Joins the rows that only a record needs. Call it before join_moments(), which changes the mean and M2 that it reads.
inline void join_higher(std::int64_t channels, double before, const Rows<double>& total, double count,
                        const Rows<double>& tile) {
  if (before == 0) {
    for (const int r : {kM3, kM4, kMin, kMax, kNonfinite}) std::memcpy(total[r], tile[r], channels * sizeof(double));
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
  for (std::int64_t c = 0; c < channels; ++c) total[kNonfinite][c] += tile[kNonfinite][c];
}

// The moments of a channel from the totals of its wide channels. count_of(v) is the number of values of wide channel v.
// If `record` is not null it receives the eight rows that a record has of these moments, each `channels` values after
// the previous one.
template <class Count>
Moments<double> merge_columns(const Rows<double>& totals, const Columns& columns, Count count_of, double* record,
                              std::int64_t channels) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Moments<double> all{0, 0, 0};
  HigherMoments<double> higher{0, 0};
  double low = kInfinity, high = -kInfinity, nonfinite = 0;
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) {
    const Moments<double> column{count_of(v), totals[kMean][v], totals[kM2][v]};
    if (record && column.count > 0) {
      higher = pebay_merge(all, higher, column, HigherMoments<double>{totals[kM3][v], totals[kM4][v]});
      low = least(low, totals[kMin][v]), high = largest(high, totals[kMax][v]);
      nonfinite += totals[kNonfinite][v];
    }
    all = chan_merge(all, column);
  }
  if (record) {  // rounding may make sums of squares negative; NaN stays NaN
    const double m2 = all.m2 < 0 ? 0 : all.m2, m4 = higher.m4 < 0 ? 0 : higher.m4;
    write_record(record, channels, 0, {all.count, all.mean, m2, higher.m3, m4, low, high, nonfinite});
  }
  return all;
}

class RunningStatistics {
 public:
  explicit RunningStatistics(const Forward& p) : p_(p) {}

  // Increments the counter, and computes the momentum from it. Call it once, before update().
  void count_batch() {
    if (p_.counter) ++*p_.counter;
    momentum_ = p_.cumulative && p_.counter ? 1.0 / static_cast<double>(*p_.counter) : p_.momentum;
  }

  void update(std::int64_t c, double mean, double variance) const {
    if (!p_.running_mean) return;
    const auto update = [&](const ChannelVector& running, double batch) {
      write(running, c, read(running, c, 0.0) * (1 - momentum_) + batch * momentum_);
    };
    update(p_.running_mean, mean);
    update(p_.running_var, variance);
  }

  // Does the same for all channels, or counts a skipped batch if the call has such a counter and a statistic is not
  // finite as a value of type A.
  template <class A>
  void update_unless_skipped(const double* means, const double* variances) {
    bool finite = true;
    for (std::int64_t c = 0; p_.skipped && c < p_.shape.c; ++c)
      finite = finite && std::isfinite(static_cast<A>(means[c])) && std::isfinite(static_cast<A>(variances[c]));
    if (!finite) {
      ++*p_.skipped;
      return;
    }
    count_batch();
    for (std::int64_t c = 0; c < p_.shape.c; ++c) update(c, means[c], variances[c]);
  }

 private:
  const Forward& p_;
  double momentum_ = 0;
};

}  // namespace bnkern::BNKERN_ISA
