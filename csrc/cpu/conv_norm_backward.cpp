// The gradients of the 3 x 3 convolution between two batch norms, with grad_input of the batch norm behind it and
// grad_sums of the one before it, in one pass over memory. See conv_norm.h.
//
// For each strip:
//   dr = grad_input of the norm behind                   (conv.inputs channels; not stored)
//   weight gradient: from y and dr
//   dy = the convolution of dr with the flipped weight, + the shortcut's gradient
//   g  = dy where the activation passed it, and the sums of g and of g xhat
#include <cmath>

#include "conv_norm.h"
#include "samples.h"
#include "sums.h"

namespace bnkern::BNKERN_ISA {
namespace {

class ConvNormBackwardPass {
 public:
  explicit ConvNormBackwardPass(const ConvNormBackward& p)
      : p_(p),
        count_(static_cast<double>(p.conv.n * p.conv.h * p.conv.w)),
        strips_(Bands(p.conv.n, p.conv.h, p.conv.w), p.conv.outputs),
        r_(p.conv.w, p.conv.inputs),
        y_(p.conv.w, p.conv.outputs),
        convolution_(p.conv.y ? row_convolution(p.conv, p.shortcut) : nullptr),
        gradient_(p.dweight ? row_gradient(strips_, p.conv.outputs, p.conv.inputs, /*absolute=*/false) : nullptr),
        space_(coefficients_bytes(r_) + coefficients_bytes(y_)),
        r_k_(make_coefficients(space_, r_)),
        y_k_(make_coefficients(space_, y_)),
        totals_(strips_.count(), kGradSumsRows, y_),
        affine_(strips_.count(), p.input.record_affine ? kRecordedGradSumsRows : 0, y_),
        dr_sums_(strips_.count(), p.output.record_gradient ? kRecordedGradInputRows : 0, r_),
        nonfinite_(strips_.count(), p.output.record_gradient ? 1 : 0, r_),
        samples_space_(p.input.record_samples ? 2 * p.conv.n * p.conv.outputs * 4 : 1) {
    if (p.input.record_samples) {
      if (!strips_.of_whole_images()) throw std::invalid_argument("conv_norm_backward: images too large for samples");
      samples_.data = reinterpret_cast<float*>(samples_space_.data());
      samples_.units = p.conv.n, samples_.channels = p.conv.outputs, samples_.rows = true;
      std::memset(samples_.data, 0, 2 * p.conv.n * p.conv.outputs * sizeof(float));
    }
    if (p.output.x) {
      set_coefficients(r_k_, r_, p.conv.inputs, p.output.mean, p.output.invstd, p.output.weight, p.output.bias);
      for (std::int64_t c = 0; c < p.conv.inputs; ++c) {
        const Columns columns{c, r_.width(), p.conv.inputs};
        set_all(r_k_.mean_dy, columns, static_cast<float>(p.output_sums[c] / count_));
        set_all(r_k_.mean_dy_xhat, columns, static_cast<float>(p.output_sums[p.conv.inputs + c] / count_));
      }
    }
    if (p.input.x)
      set_coefficients(y_k_, y_, p.conv.outputs, p.input.mean, p.input.invstd, p.input.weight, p.input.bias);
    forward_.x = p.input.x, forward_.act = p.input.act;
  }

  void run() {
    const auto size_of = [&](const WideRows& rows) { return round_up(strips_.most_rows() * rows.row(), kLanes); };
    const std::int64_t dr_size = size_of(r_), y_size = p_.dweight && !p_.y ? size_of(y_) : 0;
    const std::int64_t convolution_size = convolution_ ? convolution_->scratch() : 0;
    const std::int64_t scratch = dr_size + y_size + convolution_size + (gradient_ ? gradient_->scratch() : 0);
    const int threads = static_cast<int>(std::min<std::int64_t>(p_.conv.threads, strips_.chunks()));
    const PoolSpace pool(threads * scratch * static_cast<std::int64_t>(sizeof(float)));
#pragma omp parallel num_threads(threads)
    {
      float* const dr_space = reinterpret_cast<float*>(pool.data()) + omp_get_thread_num() * scratch;
      float* const y_space = dr_space + dr_size;
      float* const convolution_space = y_space + y_size;
      float* const gradient_space = convolution_space + convolution_size;
      if (convolution_) convolution_->prepare(convolution_space);
#pragma omp for schedule(static)
      for (std::int64_t chunk = 0; chunk < strips_.chunks(); ++chunk) {
        if (gradient_) gradient_->begin(gradient_space);
        for (std::int64_t strip = strips_.of_chunk(chunk); strip < strips_.of_chunk(chunk + 1); ++strip) {
          const std::int64_t first = strips_.first(strip), last = strips_.first(strip + 1);
          const StripRows rows(strips_, strip), next(strips_, std::min(strip + 1, strips_.count() - 1));
          const ImageRows dr = gradient_rows(strip, rows, dr_space);
          if (gradient_) {
            Ahead ahead;
            if (p_.y) rows.add_to(ahead, p_.input.x.data, y_.row());
            rows.add_to(ahead, p_.shortcut, y_.row());
            gradient_->add(first, last, input_rows(rows, y_space), dr, gradient_space, &ahead);
          }
          if (!convolution_) continue;
          Ahead ahead;
          for (const void* images : {p_.output.x.data, p_.output.dy.data}) next.add_to(ahead, images, r_.row());
          next.add_to(ahead, p_.y ? p_.y : p_.input.x.data, y_.row());
          convolution_->run(first, last, dr, convolution_space, &ahead);
          if (p_.input.x) finish_rows(strip, rows);
        }
        if (gradient_) gradient_->end(chunk, gradient_space);
      }
      if (gradient_) gradient_->join(p_.dweight);
    }
    if (p_.input.x && convolution_) finish();
    if (samples_.data) record_samples();
    if (dr_sums_.rows()) record_gradient();
  }

 private:
  // Returns the rows of dr.
  ImageRows gradient_rows(std::int64_t strip, const StripRows& rows, float* scratch) const {
    if (!p_.output.x) return {static_cast<const float*>(p_.output.dy.data), 0};
    const auto compute = [&](std::int64_t first, std::int64_t last, bool own) {
      if (first >= last) return;
      float* const dr = scratch + (first - rows.wide_first) * r_.row();
      Tensors<float> t{};
      t.x = r_.view(p_.output.x.data, first), t.dy = r_.view(p_.output.dy.data, first), t.dx = r_.view(dr, 0);
      t.act = Activation::none, t.training = p_.output.training;
      const Partition part = r_.partition(last - first);
      const Rows<float> sums = own ? dr_sums_.cleared(strip) : Rows<float>{};
      for (std::int64_t group = 0; group < part.groups; ++group)
        sums.data ? grad_input_tile<float, true>(part, t, r_k_, group, 0, sums.at(group * part.group))
                  : grad_input_tile<float, false>(part, t, r_k_, group, 0, {});
      if (sums.data) count_nonfinite(strip, part, t.dx, sums);
    };
    if (dr_sums_.rows()) {  // a record has the strip's own rows
      compute(rows.wide_first, rows.first, false);
      compute(rows.first, rows.last, true);
      compute(rows.last, rows.wide_last, false);
    } else {
      compute(rows.wide_first, rows.wide_last, false);
    }
    return {scratch, rows.wide_first};
  }

  // Counts the values of dr that are infinite or NaN, if a sum shows that there are some.
  void count_nonfinite(std::int64_t strip, const Partition& part, const View& dr, const Rows<float>& sums) const {
    const Rows<double> counts = nonfinite_.cleared(strip);
    bool finite = true;
    for (std::int64_t v = 0; v < r_.width(); ++v) finite = finite && std::isfinite(sums[kDxAbsSum][v]);
    for (std::int64_t group = 0; !finite && group < part.groups; ++group)
      add_nonfinite<float>(part, dr, group, 0, counts[0] + group * part.group);
  }

  // Returns the rows of y.
  ImageRows input_rows(const StripRows& rows, float* scratch) const {
    if (p_.y) return {p_.y, 0};
    normalize_rows(forward_, y_k_, y_, rows.wide_first, rows.wide_last, scratch, false);
    return {scratch, rows.wide_first};
  }

  // Computes the sums over a strip, and applies the mask to it.
  void finish_rows(std::int64_t strip, const StripRows& rows) const {
    Tensors<float> t{};
    t.x = y_.view(p_.input.x.data, rows.first), t.dy = y_.view(p_.conv.y, rows.first);
    if (p_.input.act != Activation::none) t.g = t.dy;
    if (p_.input.mask) t.mask = const_cast<std::uint8_t*>(p_.input.mask) + rows.first * y_.row() / 8;
    t.act = p_.input.act;
    const Partition part = y_.partition(rows.last - rows.first);
    const Rows<float> sums = affine_.cleared(strip);
    for (std::int64_t group = 0; group < part.groups; ++group) {
      const Rows<double> out = totals_[strip].at(group * part.group);
      sums.data ? grad_sums_tile<float, true>(part, t, y_k_, group, 0, out, sums.at(group * part.group))
                : grad_sums_tile<float, false>(part, t, y_k_, group, 0, out, {});
      if (samples_.data) add_samples(part, t, group, rows);
    }
  }

  // Adds the sums of the strip's samples. grad_sums has applied the mask already, and to apply it again changes
  // nothing.
  void add_samples(Partition part, const Tensors<float>& t, std::int64_t group, const StripRows& rows) const {
    part.shape.s = strips_.bands.h * strips_.bands.w,
    part.shape.n = part.rows * part.width / (part.shape.s * part.shape.c);
    SampleSums<float> sums = samples_;
    sums.data += rows.first / strips_.bands.h * part.shape.c;  // of the strip's first sample
    sample_sums_tile<float>(part, t, y_k_, group, 0, sums);
  }

  void finish() const {
    const Rows<double> all = totals_[0];
    for (std::int64_t strip = 1; strip < strips_.count(); ++strip)
      join_sums(kGradSumsRows, y_.width(), all, totals_[strip]);
    const std::int64_t channels = p_.conv.outputs;
    for (std::int64_t c = 0; c < channels; ++c) {
      const Columns columns{c, y_.width(), channels};
      const double sum = add_up(all[kSumDy], columns), product = add_up(all[kSumDyXhat], columns);
      p_.input_sums[c] = sum, p_.input_sums[channels + c] = product;
      if (p_.input.dbias) write(p_.input.dbias, c, sum);
      if (p_.input.dweight) write(p_.input.dweight, c, product);
      if (!affine_.rows()) continue;
      const auto total = [&](int row) { return affine_.total(row, columns); };
      write_record(p_.input.record_affine, channels, c,
                   {sum, total(kOfDy + kAbsSum), total(kOfDy + kSignSum), count_ - total(kOfDy + kZeros), product,
                    total(kOfDyXhat + kAbsSum), total(kOfDyXhat + kSignSum), count_ - total(kOfDyXhat + kZeros)});
    }
  }

  void record_samples() const {
    const auto add_sums = [&](std::int64_t n, bool product, std::int64_t c0, std::int64_t count, double* values) {
      const float* const sums = product ? samples_.of_product(n, c0) : samples_.of_g(n, c0);
      for (std::int64_t i = 0; i < count; ++i) values[i] += sums[i];
    };
    write_samples(p_.input.record_samples, p_.conv.n, p_.conv.outputs, 0, p_.conv.outputs, add_sums);
  }

  void record_gradient() const {
    const std::int64_t channels = p_.conv.inputs;
    for (std::int64_t c = 0; c < channels; ++c) {
      const Columns columns{c, r_.width(), channels};
      const auto total = [&](int row) { return dr_sums_.total(row, columns); };
      write_record(p_.output.record_gradient, channels, c,
                   {count_, total(kDxSum), total(kDxAbsSum), total(kDxSquareSum), total(kDxPositive),
                    total(kDxNegative), total(kDxZero), nonfinite_.total(0, columns)});
    }
  }

  const ConvNormBackward& p_;
  const double count_;  // of values per channel
  const Strips strips_;
  const WideRows r_, y_;
  const std::unique_ptr<RowConvolution> convolution_;
  const std::unique_ptr<RowGradient> gradient_;
  Workspace space_;
  const Coefficients<float> r_k_, y_k_;
  const StripSums<double> totals_;
  const StripSums<float> affine_, dr_sums_;
  const StripSums<double> nonfinite_;
  const PoolSpace samples_space_;
  SampleSums<float> samples_{};
  Forward forward_{};  // the normalisation that recomputes y
};

}  // namespace

void conv_norm_backward(const ConvNormBackward& p) { ConvNormBackwardPass(p).run(); }

}  // namespace bnkern::BNKERN_ISA
