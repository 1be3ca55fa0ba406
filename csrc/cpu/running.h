// The update of the running statistics and of the counters of a batch norm in training.
#pragma once

#include <cmath>

#include "drive.h"

namespace bnkern::BNKERN_ISA {

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
