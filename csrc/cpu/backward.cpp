// grad_sums and grad_input over all tiles. Adds up the partial sums, and computes the coefficients of grad_input.
#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "drive.h"
#include "samples.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

template <class T>
class BackwardPhases : public Phases<T> {
 public:
  using A = Accumulator<T>;

  explicit BackwardPhases(const Backward& p)
      : Phases<T>{.part = partition_of(p),
                  .element_bytes = 2 * sizeof(T),
                  .applying = p.input,
                  .max_threads = p.threads,
                  .measured = {},
                  .measured_sums = {},
                  .applied_sums = {}},
        p_(p),
        record_affine_(p.record_affine && p.sums),
        record_gradient_(p.record_gradient && p.dx),
        record_samples_(p.record_samples && p.sums),
        width_(this->part.width),
        weights_(p.training && p.dx ? static_cast<const A*>(p.sample_weight) : nullptr),
        count_(weights_ ? sum_of_weights(weights_, this->part.count()) : static_cast<double>(this->part.count())),
        space_(7 * Workspace::bytes<A>(width_) + 3 * Workspace::bytes<double>(kMostRows * width_)),
        samples_space_(Workspace::bytes<A>(samples_size(this->part))),
        sum_dy_(static_cast<A*>(p.sum_dy)),
        sum_dy_xhat_(static_cast<A*>(p.sum_dy_xhat)) {
    for (A** array : {&k_.mean, &k_.invstd, &k_.weight, &k_.bias, &k_.mean_dy, &k_.mean_dy_xhat, &k_.scale})
      *array = space_.template take<A>(width_);
    if (record_samples_) {
      samples_ = SampleSums<A>(this->part, samples_space_.template take<A>(samples_size(this->part)));
      std::memset(samples_.data, 0, samples_size(this->part) * sizeof(A));
    }
    this->measured = make_totals(space_, p.sums ? kGradSumsRows : 0, width_);
    this->measured_sums = make_totals(space_, record_affine_ ? kRecordedGradSumsRows : 0, width_);
    this->applied_sums = make_totals(space_, record_gradient_ ? kRecordedGradInputRows : 0, width_);
    nonfinite_ = make_totals(space_, record_gradient_ ? 1 : 0, width_).values[0];
    t_.x = p.x, t_.dy = p.dy, t_.dx = p.dx, t_.dresidual = p.dresidual;
    t_.mask = const_cast<std::uint8_t*>(p.mask), t_.act = p.act, t_.training = p.training;
    t_.stream = this->elements() * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;
    for (std::int64_t group = 0; group < this->part.groups; ++group)
      for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) { set_coefficients(c, columns); });
  }

  void measure(std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
    record_affine_ ? grad_sums_tile<T, true>(this->part, t_, k_, group, tile, out, sums)
                   : grad_sums_tile<T, false>(this->part, t_, k_, group, tile, out, sums);
    if (record_samples_) sample_sums_tile<T>(this->part, t_, k_, group, tile, samples_);
  }

  void join(std::int64_t channels, double, const Rows<double>& total, double, const Rows<double>& tile) {
    join_sums(this->measured.rows, channels, total, tile);
  }

  void finish(std::int64_t group) {
    if (record_samples_) finish_samples(group);
    for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) {
      const double sum = add_up(this->measured.values[kSumDy], columns);
      const double product = add_up(this->measured.values[kSumDyXhat], columns);
      if (sum_dy_) sum_dy_[c] = static_cast<A>(sum);
      if (sum_dy_xhat_) sum_dy_xhat_[c] = static_cast<A>(product);
      if (p_.double_sums) p_.double_sums[c] = sum, p_.double_sums[p_.shape.c + c] = product;
      if (p_.dbias) write(p_.dbias, c, sum);
      if (p_.dweight) write(p_.dweight, c, product);
      set_means(columns, sum, product);
      if (!record_affine_) return;
      const auto total = [&](int r) { return add_up(this->measured_sums.values[r], columns); };
      write_record(p_.record_affine, p_.shape.c, c,
                   {sum, total(kOfDy + kAbsSum), total(kOfDy + kSignSum), count_ - total(kOfDy + kZeros), product,
                    total(kOfDyXhat + kAbsSum), total(kOfDyXhat + kSignSum), count_ - total(kOfDyXhat + kZeros)});
    });
  }

  void apply(std::int64_t group, std::int64_t tile, const Rows<A>& sums) {
    if (weights_) return weighted_grad_input_tile<T>(this->part, t_, k_, weights_, group, tile);
    record_gradient_ ? grad_input_tile<T, true>(this->part, t_, k_, group, tile, sums)
                     : grad_input_tile<T, false>(this->part, t_, k_, group, tile, sums);
  }

  void close(std::int64_t group) {
    if (!record_gradient_) return;
    const auto total = [&](int r, const Columns& columns) { return add_up(this->applied_sums.values[r], columns); };
    bool finite = true;
    for_channels(this->part, group, [&](std::int64_t, const Columns& columns) {
      finite = finite && std::isfinite(total(kDxAbsSum, columns));
    });
    if (!finite)  // this reads dx again
      for (std::int64_t tile = 0; tile < this->part.tiles; ++tile)
        add_nonfinite<T>(this->part, p_.dx, group, tile, nonfinite_ + group * this->part.group);
    for_channels(this->part, group, [&](std::int64_t c, const Columns& columns) {
      write_record(p_.record_gradient, p_.shape.c, c,
                   {count_, total(kDxSum, columns), total(kDxAbsSum, columns), total(kDxSquareSum, columns),
                    total(kDxPositive, columns), total(kDxNegative, columns), total(kDxZero, columns),
                    add_up(nonfinite_, columns)});
    });
  }

 private:
  std::int64_t samples_size(const Partition& part) const {
    return record_samples_ ? 2 * SampleSums<A>::units_of(part) * part.shape.c : 0;
  }

  void finish_samples(std::int64_t group) {
    const Partition& part = this->part;
    const auto add_sums = [&](std::int64_t n, bool product, std::int64_t c0, std::int64_t count, double* values) {
      const Units units = units_of_sample(part, n);
      for (std::int64_t unit = units.first; unit <= units.last; ++unit) {
        const A* const sums = product ? samples_.of_product(unit, c0) : samples_.of_g(unit, c0);
        for (std::int64_t i = 0; i < count; ++i) values[i] += sums[i];
      }
    };
    const std::int64_t end = std::min((group + 1) * part.group, part.shape.c);
    write_samples(p_.record_samples, part.shape.n, part.shape.c, group * part.group, end, add_sums);
  }

  static Partition partition_of(const Backward& p) {
    return make_partition(p.shape, p.shape.rows && gapless(p.dy, p.shape) && gapless(p.x, p.shape) &&
                                       gapless(p.dx, p.shape) && gapless(p.dresidual, p.shape));
  }

  void set_coefficients(std::int64_t c, const Columns& columns) {
    const A invstd = p_.invstd ? static_cast<const A*>(p_.invstd)[c] : A(1), weight = read(p_.weight, c, A(1));
    set_all(k_.mean, columns, p_.mean ? static_cast<const A*>(p_.mean)[c] : A(0));
    set_all(k_.invstd, columns, invstd);
    set_all(k_.weight, columns, weight);
    set_all(k_.bias, columns, read(p_.bias, c, A(0)));
    set_all(k_.scale, columns, weight * invstd);
    if (!p_.sums && p_.training) set_means(columns, sum_dy_[c], sum_dy_xhat_[c]);
  }

  void set_means(const Columns& columns, double sum, double product) {
    set_all(k_.mean_dy, columns, static_cast<A>(sum / count_));
    set_all(k_.mean_dy_xhat, columns, static_cast<A>(product / count_));
  }

  const Backward& p_;
  const bool record_affine_, record_gradient_, record_samples_;
  const std::int64_t width_;
  const A* const weights_;
  const double count_;  // of values per channel, or the sum of their weights
  Workspace space_, samples_space_;
  SampleSums<A> samples_{};
  Coefficients<A> k_{};
  Tensors<T> t_{};
  double* nonfinite_;  // the numbers of values of dx that are infinite or NaN
  A *const sum_dy_, *const sum_dy_xhat_;
};

}  // namespace

void backward(const Backward& p) {
  with_dtype(p.dtype, [&](auto* t) {
    BackwardPhases<std::remove_pointer_t<decltype(t)>> phases(p);
    run(phases);
  });
}

}  // namespace bnkern::BNKERN_ISA
