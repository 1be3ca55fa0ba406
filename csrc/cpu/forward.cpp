// moments and normalize over all tiles. Joins the partial moments, and computes the coefficients from them.
#include <cmath>
#include <limits>

#include "cpu.h"
#include "drive.h"
#include "statistics.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kActiveRow = 8;  // the row of a record from normalize; the rows before it are from moments

// join_moments() for a tile with weights. A tile of weight zero changes nothing.
void join_weighted_moments(std::int64_t channels, const Rows<double>& total, const Rows<double>& tile) {
  const auto of = [](const Rows<double>& rows, std::int64_t c) {
    return Moments<double>{rows[kWeight][c], rows[kMean][c], rows[kM2][c]};
  };
  for (std::int64_t c = 0; c < channels; ++c) {
    const Moments<double> both = chan_merge(of(total, c), of(tile, c));
    total[kWeight][c] = both.count, total[kMean][c] = both.mean, total[kM2][c] = both.m2;
  }
}

// The number of values of wide channel v.
double values_of(const Partition& part, std::int64_t v) {
  if (!part.shape.rows) return static_cast<double>(part.count());
  return static_cast<double>(part.rows + (v < part.leftover));
}

template <class T>
class ForwardPhases : public Phases<T> {
 public:
  using A = Accumulator<T>;

  explicit ForwardPhases(const Forward& p)
      : Phases<T>{.part = partition_of(p),
                  .element_bytes = sizeof(T),
                  .applying = false,
                  .max_threads = p.threads,
                  .measured = {},
                  .measured_sums = {},
                  .applied_sums = {}},
        p_(p),
        running_(p),
        record_(p.record != nullptr),
        as_one_(record_ && !p.moments),
        weights_(p.moments ? static_cast<const A*>(p.sample_weight) : nullptr),
        width_(this->part.width),
        space_(4 * Workspace::bytes<A>(width_) + 3 * Workspace::bytes<double>(kMostRows * width_) +
               2 * Workspace::bytes<double>(p.shape.c)),
        means_(static_cast<A*>(p.mean)),
        spreads_(static_cast<A*>(p.spread)) {
    for (A** array : {&k_.mean, &k_.invstd, &k_.weight, &k_.bias}) *array = space_.template take<A>(width_);
    this->applying = p.normalize && !as_one_;
    const int rows = record_ ? kRecordedMomentsRows : weights_ ? kWeightedMomentsRows : p.moments ? kMomentsRows : 0;
    this->measured = make_totals(space_, rows, width_);
    this->measured_sums = make_totals(space_, as_one_ ? kRecordedNormalizeRows : 0, width_);
    this->applied_sums = make_totals(space_, record_ && !as_one_ ? kRecordedNormalizeRows : 0, width_);
    t_.x = p.x, t_.residual = p.residual, t_.y = p.y, t_.mask = p.mask, t_.act = p.act;
    t_.stream = this->elements() * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;
    if (p.skipped && p.moments)
      for (double** row : {&batch_mean_, &batch_var_}) *row = space_.template take<double>(p.shape.c);
    else if (p.moments)
      running_.count_batch();
    if (!p.moments) use_given_statistics();
  }

  void measure(std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
    if (weights_) return weighted_moments_tile<T>(this->part, p_.x, weights_, group, tile, out);
    record_ ? moments_tile<T, true>(this->part, p_.x, group, tile, out)
            : moments_tile<T, false>(this->part, p_.x, group, tile, out);
    if (as_one_) apply(group, tile, sums);
  }

  void join(std::int64_t channels, double before, const Rows<double>& total, double count, const Rows<double>& tile) {
    if (weights_) return join_weighted_moments(channels, total, tile);
    if (record_) join_higher(channels, before, total, count, tile);
    join_moments(channels, before, total, count, tile);
  }

  void finish(std::int64_t group) {
    const Rows<double>& totals = this->measured.values;
    for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) {
      const auto count_of = [&](std::int64_t v) { return values_of(this->part, v); };
      Moments<double> all =
          weights_ ? weighted_moments(columns)
                   : merge_columns(totals, columns, count_of, record_ ? p_.record + c : nullptr, p_.shape.c);
      const double m2 = all.m2 < 0 ? 0 : all.m2;  // rounding may make it negative; NaN stays NaN
      if (!p_.moments) return;
      means_[c] = static_cast<A>(all.mean);
      spreads_[c] = static_cast<A>(p_.normalize ? 1 / std::sqrt(m2 / all.count + p_.eps) : m2);
      const double variance = m2 / (weights_ && all.count <= 1 ? all.count : all.count - 1);
      if (p_.skipped)
        batch_mean_[c] = all.mean, batch_var_[c] = variance;
      else
        running_.update(c, all.mean, variance);
      if (p_.normalize) set_coefficients(c, columns);
    });
    if (as_one_) record_active(group, this->measured_sums);
  }

  void apply(std::int64_t group, std::int64_t tile, const Rows<A>& sums) {
    record_ ? normalize_tile<T, true>(this->part, t_, k_, group, tile, sums)
            : normalize_tile<T, false>(this->part, t_, k_, group, tile, sums);
  }

  void close(std::int64_t group) {
    if (this->applied_sums.rows) record_active(group, this->applied_sums);
  }

  // Call it after the phases. If batches may be skipped, the running statistics are updated here, because the decision
  // needs the statistics of all channels.
  void update_unless_skipped() {
    if (!p_.skipped || !p_.moments) return;
    running_.update_unless_skipped<A>(batch_mean_, batch_var_);
  }

 private:
  static Partition partition_of(const Forward& p) {
    return make_partition(
        p.shape, p.shape.rows && gapless(p.x, p.shape) && gapless(p.residual, p.shape) && gapless(p.y, p.shape));
  }

  // The moments of a channel with weights. Without any weight they are NaN, and so is y.
  __attribute__((noinline)) Moments<double> weighted_moments(const Columns& columns) const {
    const Rows<double>& totals = this->measured.values;
    Moments<double> all{0, 0, 0};
    for (std::int64_t v = columns.first; v < columns.end; v += columns.step)
      all = chan_merge(all, Moments<double>{totals[kWeight][v], totals[kMean][v], totals[kM2][v]});
    if (all.count == 0) all.mean = std::numeric_limits<double>::quiet_NaN();
    return all;
  }

  // For a call without moments. Uses the running statistics, the statistics of the call, or none.
  void use_given_statistics() {
    for (std::int64_t group = 0; group < this->part.groups; ++group)
      for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) {
        if (p_.running_mean) {
          means_[c] = static_cast<A>(read(p_.running_mean, c, 0.0));
          spreads_[c] = static_cast<A>(1 / std::sqrt(read(p_.running_var, c, 0.0) + p_.eps));
        }
        set_coefficients(c, columns);
      });
  }

  void set_coefficients(std::int64_t c, const Columns& columns) {
    set_all(k_.mean, columns, means_ ? means_[c] : A(0));
    set_all(k_.invstd, columns, spreads_ ? spreads_[c] : A(1));
    set_all(k_.weight, columns, read(p_.weight, c, A(1)));
    set_all(k_.bias, columns, read(p_.bias, c, A(0)));
  }

  void record_active(std::int64_t group, const Totals& sums) {
    for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) {
      p_.record[kActiveRow * p_.shape.c + c] = add_up(sums.values[kActive], columns);
    });
  }

  const Forward& p_;
  RunningStatistics running_;
  // The phase moments computes the moments of a record. In a call with a record but without moments (as_one_), the
  // first phase computes the moments of a tile and then normalises the tile. Such a call has no second phase.
  const bool record_, as_one_;
  const A* const weights_;
  const std::int64_t width_;
  Workspace space_;
  Coefficients<A> k_{};
  Tensors<T> t_{};
  double *batch_mean_ = nullptr, *batch_var_ = nullptr;  // [C], if batches may be skipped
  A *const means_, *const spreads_;
};

}  // namespace

void forward(const Forward& p) {
  with_dtype(p.dtype, [&](auto* t) {
    ForwardPhases<std::remove_pointer_t<decltype(t)>> phases(p);
    run(phases);
    phases.update_unless_skipped();
  });
}

}  // namespace bnkern::BNKERN_ISA
