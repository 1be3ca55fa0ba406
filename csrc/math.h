// The arithmetic of batch norm, the only copy: for scalars and 16-lane vectors, on the host and in
// CUDA. Multiply-adds are written out as fma, since contraction is off everywhere: the backward then
// recomputes the forward's ReLU mask bit for bit. Formulas: bnkern/backends/reference.py.
#pragma once

#ifdef __CUDACC__
#define BNKERN_HD __host__ __device__ __forceinline__
#else
#include <cmath>
// Always inlined, so that no copy compiled for one instruction set is ever linked into another's.
#define BNKERN_HD __attribute__((always_inline)) inline
#endif

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

template <class T>
struct Moments {
  T count;
  T mean;
  T m2;  // sum of (x - mean)^2
};

// Chan, Golub and LeVeque 1979. A part of count zero is the identity on either side.
template <class T>
BNKERN_HD Moments<T> chan_merge(Moments<T> a, Moments<T> b) {
  if (b.count == T(0)) return a;
  if (a.count == T(0)) return b;
  const T count = a.count + b.count;
  const T share = b.count / count;
  const T delta = b.mean - a.mean;
  return {count, fma(delta, share, a.mean), fma(delta * delta, a.count * share, a.m2 + b.m2)};
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

// dx of the training mode; mean_dy = sum dy / M, mean_dy_xhat = sum dy * xhat / M, scale = weight * invstd.
template <class V>
BNKERN_HD V input_gradient(V dy, V xhat, V mean_dy, V mean_dy_xhat, V scale) {
  return (dy - fma(xhat, mean_dy_xhat, mean_dy)) * scale;
}

}  // namespace bnkern
