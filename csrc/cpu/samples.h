// The record of the samples' contributions to the gradients of a batch norm's parameters.
#pragma once

#include <algorithm>
#include <cstdint>

namespace bnkern::BNKERN_ISA {

// Writes the rows SAMPLES of bnkern/backends/records.py for the channels [begin, end) of [5, channels].
// add_sums(n, product, c0, count, values) adds the sums of g (or of g * xhat, if `product`) of sample n to `values`,
// for `count` channels from c0 on.
template <class AddSums>
void write_samples(double* record, std::int64_t samples, std::int64_t channels, std::int64_t begin, std::int64_t end,
                   AddSums add_sums) {
  constexpr std::int64_t kSome = 32;  // channels at a time
  for (std::int64_t c0 = begin; c0 < end; c0 += kSome) {
    const std::int64_t some = std::min(end - c0, kSome);
    for (int which = 0; which < 2; ++which) {
      // Calls f(values) for the sums [some] of each sample.
      const auto for_samples = [&](auto f) {
        for (std::int64_t n = 0; n < samples; ++n) {
          double values[kSome] = {};
          add_sums(n, which == 1, c0, some, values);
          f(values);
        }
      };
      double total[kSome] = {}, m2[kSome] = {}, mean[kSome];
      for_samples([&](const double* values) {
        for (std::int64_t i = 0; i < some; ++i) total[i] += values[i];
      });
      for (std::int64_t i = 0; i < some; ++i) mean[i] = total[i] / static_cast<double>(samples);
      for_samples([&](const double* values) {
        for (std::int64_t i = 0; i < some; ++i) m2[i] += (values[i] - mean[i]) * (values[i] - mean[i]);
      });
      double* const rows = record + (1 + 2 * which) * channels + c0;
      for (std::int64_t i = 0; i < some; ++i) rows[i] = total[i], rows[channels + i] = m2[i];
    }
    for (std::int64_t i = 0; i < some; ++i) record[c0 + i] = static_cast<double>(samples);
  }
}

}  // namespace bnkern::BNKERN_ISA
