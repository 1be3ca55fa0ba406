// Statistics of channels as calls read and write them: running statistics, saved mean and invstd, and sums of
// gradients.
#pragma once

#include "device.h"

namespace bnkern {

// The part of the updated state that a call also reads. It is read before the block waits for other blocks.
struct State {
  double momentum;  // the weight of this batch
  std::int64_t counter;
  float running_mean, running_var;
};
BNKERN_DEVICE State read_state(const Forward& p, std::int64_t c) {
  State state{p.momentum, p.counter ? *p.counter : 0, read(p.running_mean, c, 0.0f), read(p.running_var, c, 0.0f)};
  if (p.cumulative && p.counter) state.momentum = 1.0 / static_cast<double>(state.counter + 1);
  return state;
}

// Counts the batch. All threads of one block of each of `groups` groups call this, the first of them with the state.
// One thread stores the counter. If the momentum depends on the counter, this is a thread of the last block to arrive,
// because then all blocks have read it.
BNKERN_DEVICE void update_counter(const Forward& p, const Workspace& space, const State& state, unsigned group,
                                  unsigned groups) {
  if (!p.counter) return;
  const bool stores = p.cumulative ? last_of_blocks(space.counting, groups) : group == 0;
  if (stores && threadIdx.x == 0) *p.counter = state.counter + 1;
}

// The statistics of a channel: the mean, and invstd in a call with normalize, or M2 otherwise.
struct Statistics {
  float mean, spread;
};
BNKERN_DEVICE Statistics statistics_of(const Forward& p, const Count& count, const Moments<double>& all) {
  const double spread = p.normalize ? inverse_root(fma(all.m2, count.inverse, p.eps)) : all.m2;
  return {static_cast<float>(all.mean), static_cast<float>(spread)};
}
BNKERN_DEVICE void save_statistics(const Forward& p, std::int64_t c, const Count& count, const Moments<double>& all,
                                   Statistics s, const State& state) {
  static_cast<float*>(p.mean)[c] = s.mean;
  static_cast<float*>(p.spread)[c] = s.spread;
  if (!p.running_mean) return;
  write(p.running_mean, c, state.running_mean * (1 - state.momentum) + all.mean * state.momentum);
  write(p.running_var, c, state.running_var * (1 - state.momentum) + all.m2 * count.unbiased * state.momentum);
}

// The statistics for normalize. If the call has no moments but has running statistics, they are computed from those.
// Otherwise they are read from mean and spread. If these are null, the normalisation is the identity.
BNKERN_DEVICE Statistics given_statistics(const Forward& p, std::int64_t c) {
  if (!p.moments && p.running_mean) {
    const double var = read(p.running_var, c, 0.0f);
    return {read(p.running_mean, c, 0.0f), static_cast<float>(1 / sqrt(var + p.eps))};
  }
  return {read(p.mean, c, 0.0f), read(p.spread, c, 1.0f)};
}

// The median of three values of a channel. Distances from it are small numbers even if the mean is large. A single
// value could be an outlier, and then all distances would be large. value(0), value(1) and value(2) are the first
// value, one in the middle and the last.
template <class F>
BNKERN_DEVICE float middle_of(F value) {
  const float a = value(0), b = value(1), c = value(2);
  const float high = largest(a, b);
  return largest(least(a, b), least(high, c));
}

// Saves the sums of a channel, which are the gradients of its parameters.
BNKERN_DEVICE void save_sums(const Backward& p, std::int64_t c, PivotSums sums) {
  if (p.sum_dy) static_cast<float*>(p.sum_dy)[c] = static_cast<float>(sums.first);
  if (p.sum_dy_xhat) static_cast<float*>(p.sum_dy_xhat)[c] = static_cast<float>(sums.second);
  write(p.dbias, c, sums.first);
  write(p.dweight, c, sums.second);
  if (!p.record_affine) return;
  p.record_affine[c] = sums.first;  // the rows bias_sum and weight_sum
  p.record_affine[4 * p.shape.c + c] = sums.second;
}
BNKERN_DEVICE Pair means_of(const Count& count, PivotSums sums) {
  return {static_cast<float>(sums.first * count.inverse), static_cast<float>(sums.second * count.inverse)};
}
// The means that grad_sums stored in the workspace, or those of the sums that the call has.
BNKERN_DEVICE Pair given_means(const Backward& p, const Count& count, const Pair* totals, std::int64_t c) {
  if (!p.training) return {0, 0};
  return p.sums ? totals[c] : means_of(count, {read(p.sum_dy, c, 0.0f), read(p.sum_dy_xhat, c, 0.0f)});
}

}  // namespace bnkern
