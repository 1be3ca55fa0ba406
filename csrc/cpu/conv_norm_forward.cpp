// The 3 x 3 convolution of the output of a batch norm, and the moments of its result, in one pass over memory. See
// conv_norm.h.
#include <cmath>

#include "conv_norm.h"
#include "statistics.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kActiveRow = 8;  // of a record of activations, see forward.cpp

class ConvNormForward {
 public:
  explicit ConvNormForward(const ConvNorm& p)
      : p_(p),
        strips_(Bands(p.conv.n, p.conv.h, p.conv.w), p.conv.outputs),
        inputs_(p.conv.w, p.conv.inputs),
        outputs_(p.conv.w, p.conv.outputs),
        convolution_(row_convolution(p.conv)),
        space_(coefficients_bytes(inputs_) + 2 * Workspace::bytes<double>(p.conv.outputs)),
        k_(make_coefficients(space_, inputs_)),
        totals_(strips_.count(), p.output.record ? kRecordedMomentsRows : kMomentsRows, outputs_),
        active_(strips_.count(), p.input.record ? kRecordedNormalizeRows : 0, inputs_) {
    if (p.input.x)
      set_coefficients(k_, inputs_, p.conv.inputs, p.input.mean, p.input.spread, p.input.weight, p.input.bias);
  }

  void run() {
    const std::int64_t y_size = round_up(strips_.most_rows() * inputs_.row(), kLanes);
    const std::int64_t scratch = y_size + convolution_->scratch();
    const int threads = static_cast<int>(std::min<std::int64_t>(p_.conv.threads, strips_.count()));
    const PoolSpace pool(threads * scratch * static_cast<std::int64_t>(sizeof(float)));
#pragma omp parallel num_threads(threads)
    {
      float* const y = reinterpret_cast<float*>(pool.data()) + omp_get_thread_num() * scratch;
      convolution_->prepare(y + y_size);
#pragma omp for schedule(static)
      for (std::int64_t strip = 0; strip < strips_.count(); ++strip) {
        const StripRows rows(strips_, strip), next(strips_, std::min(strip + 1, strips_.count() - 1));
        Ahead ahead;
        for (const void* images : {p_.input.x.data, p_.input.residual.data, p_.input.y.data})
          next.add_to(ahead, images, inputs_.row());
        convolution_->run(strips_.first(strip), strips_.first(strip + 1), input_rows(strip, rows, y), y + y_size,
                          p_.input.x ? &ahead : nullptr);
        if (p_.output.moments) measure(strip, rows);
      }
    }
    if (p_.output.moments)
      finish();
    else if (p_.output.mean)
      read_running();
    if (active_.rows())
      for (std::int64_t c = 0; c < p_.conv.inputs; ++c)
        p_.input.record[kActiveRow * p_.conv.inputs + c] = active_.total(kActive, {c, inputs_.width(), p_.conv.inputs});
  }

 private:
  // Returns the rows of y that the strip needs.
  ImageRows input_rows(std::int64_t strip, const StripRows& rows, float* scratch) const {
    if (!p_.input.x) return {p_.conv.x, 0};
    float* const stored = static_cast<float*>(p_.input.y.data);
    const auto normalize = [&](std::int64_t first, std::int64_t last, float* y, bool own) {
      normalize_rows(p_.input, k_, inputs_, first, last, y, own, own ? active_.cleared(strip) : Rows<float>{});
    };
    const auto place = [&](std::int64_t row) { return scratch + (row - rows.wide_first) * inputs_.row(); };
    if (stored && rows.wide_first == rows.first && rows.wide_last == rows.last) {
      normalize(rows.first, rows.last, stored + rows.first * inputs_.row(), true);
      return {stored, 0};
    }
    normalize(rows.wide_first, rows.first, scratch, false);
    normalize(rows.first, rows.last, place(rows.first), true);
    normalize(rows.last, rows.wide_last, place(rows.last), false);
    if (stored)
      std::memcpy(stored + rows.first * inputs_.row(), place(rows.first),
                  (rows.last - rows.first) * inputs_.row() * sizeof(float));
    return {scratch, rows.wide_first};
  }

  // The moments of a strip of r.
  void measure(std::int64_t strip, const StripRows& rows) const {
    const Partition part = outputs_.partition(rows.last - rows.first);
    const View r = outputs_.view(p_.conv.y, rows.first);
    for (std::int64_t group = 0; group < part.groups; ++group) {
      const Rows<double> out = totals_[strip].at(group * part.group);
      p_.output.record ? moments_tile<float, true>(part, r, group, 0, out)
                       : moments_tile<float, false>(part, r, group, 0, out);
    }
  }

  void finish() {
    const std::int64_t channels = p_.conv.outputs;
    const auto count_of = [&](std::int64_t strip) {
      const StripRows rows(strips_, strip);
      return static_cast<double>(outputs_.partition(rows.last - rows.first).rows);
    };
    const Rows<double> all = totals_[0];
    double count = count_of(0);
    for (std::int64_t strip = 1; strip < strips_.count(); ++strip) {
      if (p_.output.record) join_higher(outputs_.width(), count, all, count_of(strip), totals_[strip]);
      join_moments(outputs_.width(), count, all, count_of(strip), totals_[strip]);
      count += count_of(strip);
    }
    double *const means = space_.take<double>(channels), *const variances = space_.take<double>(channels);
    for (std::int64_t c = 0; c < channels; ++c) {
      const Moments<double> moments = merge_columns(
          all, {c, outputs_.width(), channels}, [&](std::int64_t) { return count; },
          p_.output.record ? p_.output.record + c : nullptr, channels);
      const double m2 = moments.m2 < 0 ? 0 : moments.m2;  // rounding may make it negative; NaN stays NaN
      static_cast<float*>(p_.output.mean)[c] = static_cast<float>(moments.mean);
      static_cast<float*>(p_.output.spread)[c] = static_cast<float>(1 / std::sqrt(m2 / moments.count + p_.output.eps));
      means[c] = moments.mean + bias(c), variances[c] = m2 / (moments.count - 1);
    }
    RunningStatistics(p_.output).update_unless_skipped<float>(means, variances);
  }

  double bias(std::int64_t c) const { return p_.bias ? p_.bias[c] : 0; }

  // In eval mode the statistics are the running ones, as in forward.cpp.
  void read_running() const {
    for (std::int64_t c = 0; c < p_.conv.outputs; ++c) {
      static_cast<float*>(p_.output.mean)[c] = static_cast<float>(read(p_.output.running_mean, c, 0.0) - bias(c));
      static_cast<float*>(p_.output.spread)[c] =
          static_cast<float>(1 / std::sqrt(read(p_.output.running_var, c, 0.0) + p_.output.eps));
    }
  }

  const ConvNorm& p_;
  const Strips strips_;
  const WideRows inputs_, outputs_;
  const std::unique_ptr<RowConvolution> convolution_;
  Workspace space_;
  const Coefficients<float> k_;
  const StripSums<double> totals_;
  const StripSums<float> active_;
};

}  // namespace

void conv_norm_forward(const ConvNorm& p) { ConvNormForward(p).run(); }

}  // namespace bnkern::BNKERN_ISA
