// The only copy of the arithmetic, for scalars and 16-lane vectors, on the host and in CUDA.
// Contraction is off everywhere, and multiply-adds are explicit calls of fma. So the backward recomputes
// the forward's mask bit for bit. The formulas are those of bnkern/backends/reference.
#pragma once

#ifndef __CUDACC__
#include <cmath>
#endif

#include "dtype.h"

namespace bnkern {

BNKERN_HD float fma(float a, float b, float c) {
#ifdef __CUDACC__
  return ::fmaf(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
BNKERN_HD double fma(double a, double b, double c) {
#ifdef __CUDACC__
  return ::fma(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// The minimum and the maximum. Return b if a is NaN, because every comparison with NaN is false. Pass a new value as a
// and the running extreme as b to ignore NaNs.
template <class T>
BNKERN_HD T least(T a, T b) {
  return a < b ? a : b;
}
template <class T>
BNKERN_HD T largest(T a, T b) {
  return a > b ? a : b;
}

template <class T>
struct Moments {
  T count;
  T mean;
  T m2;  // sum of (x - mean)^2
};

// Joins part b to part a (Chan, Golub and LeVeque 1979). `share` is b's share of all values, and weight is
// a.count * share.
template <class T>
BNKERN_HD void chan_join(T* mean, T* m2, T b_mean, T b_m2, T share, T weight) {
  const T delta = b_mean - *mean;
  *mean = fma(delta, share, *mean);
  *m2 = fma(delta * delta, weight, *m2 + b_m2);
}

// The same for parts with counts. A part of count zero changes nothing.
template <class T>
BNKERN_HD Moments<T> chan_merge(Moments<T> a, Moments<T> b) {
  if (b.count == T(0)) return a;
  if (a.count == T(0)) return b;
  const T count = a.count + b.count, share = b.count / count;
  chan_join(&a.mean, &a.m2, b.mean, b.m2, share, a.count * share);
  return {count, a.mean, a.m2};
}

// For many parts whose means are relative to one pivot: the sums of the distances from the pivot, and of their squares.
// They can simply be added. Use doubles, which stay accurate unless the pivot is more than 1e6 sigma from the mean.
struct PivotSums {
  double first, second;
};
BNKERN_HD PivotSums pivot_sums(Moments<double> part) {
  const double sum = part.count * part.mean;
  return {sum, fma(sum, part.mean, part.m2)};
}
BNKERN_HD Moments<double> moments_of(double count, PivotSums sums) {
  const double mean = sums.first / count, m2 = fma(-sums.first, mean, sums.second);
  return {count, mean, m2 < 0 ? 0 : m2};  // rounding may make it negative; NaN stays NaN
}

// The sums of (x - mean)^3 and (x - mean)^4.
template <class T>
struct HigherMoments {
  T m3, m4;
};

// The higher moments of two parts together, by the pairwise formulas of Pebay 2008.
template <class T>
BNKERN_HD HigherMoments<T> pebay_merge(Moments<T> a, HigherMoments<T> of_a, Moments<T> b, HigherMoments<T> of_b) {
  if (b.count == T(0)) return of_a;
  if (a.count == T(0)) return of_b;
  const T count = a.count + b.count;
  const T share_a = a.count / count, share_b = b.count / count, between = a.count * share_b;
  const T delta = b.mean - a.mean, square = delta * delta;
  const T m3 = square * (between * (share_a - share_b)) + T(3) * (share_a * b.m2 - share_b * a.m2);
  const T m4 = square * (between * (share_a * share_a - share_a * share_b + share_b * share_b)) +
               T(6) * (share_a * share_a * b.m2 + share_b * share_b * a.m2);
  return {of_a.m3 + of_b.m3 + delta * m3,
          of_a.m4 + of_b.m4 + square * m4 + T(4) * delta * (share_a * of_b.m3 - share_b * of_a.m3)};
}

// The unit-variance value, xhat.
template <class V>
BNKERN_HD V standardize(V x, V mean, V invstd) {
  return (x - mean) * invstd;
}

// weight * xhat + bias, not yet rounded for storage.
template <class V>
BNKERN_HD V scale_shift(V xhat, V weight, V bias) {
  return fma(xhat, weight, bias);
}

// dx in training mode. mean_dy = sum dy / M, mean_dy_xhat = sum dy * xhat / M, scale = weight * invstd.
template <class V>
BNKERN_HD V input_gradient(V dy, V xhat, V mean_dy, V mean_dy_xhat, V scale) {
  return (dy - fma(xhat, mean_dy_xhat, mean_dy)) * scale;
}

// One step of SGD with momentum. The product momentum * velocity is rounded before the addition, as in torch's kernel
// for the CPU, so that both have the same bits.
template <class V>
BNKERN_HD V decayed_gradient(V gradient, V weight_decay, V parameter) {
  return fma(weight_decay, parameter, gradient);
}
template <class V>
BNKERN_HD V next_velocity(V momentum, V velocity, V gradient) {
  return momentum * velocity + gradient;
}
template <class V>
BNKERN_HD V next_parameter(V parameter, V minus_lr, V velocity) {
  return fma(minus_lr, velocity, parameter);
}

}  // namespace bnkern
