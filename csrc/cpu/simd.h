// A vector of 16 lanes for every machine. It is one AVX-512 register, two AVX2 registers, or an array of the compiler's
// vector types. All kernels use it, so every instruction set gives the same bits.
//
//   Vec<float>, Vec<double>   16 accumulator lanes
//   Mask                      16 booleans, to and from 16 bits
//
// storage.h has the types of values in memory, and their loads and stores.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../math.h"

#define BNKERN_INLINE __attribute__((always_inline)) inline

namespace bnkern::BNKERN_ISA {

constexpr int kLanes = 16;

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return divide_up(a, b) * b; }

// ------------------------------------------- arrays of the compiler's vector types, for any machine and for double

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// 16 lanes as registers of the machine. With loops over single lanes the compiler would unroll the loops and join the
// lanes again. This takes two to three times as long to compile, and the code is slower.
template <class A>
struct Registers {
  typedef A Register __attribute__((vector_size(kRegisterBytes)));
  using Bits = decltype(Register{} < Register{});  // -1 where true
  static constexpr int kWidth = kRegisterBytes / static_cast<int>(sizeof(A)), kCount = kLanes / kWidth;
};

template <class A>
struct ArrayMask : Registers<A> {
  using typename Registers<A>::Bits;
  using Registers<A>::kWidth, Registers<A>::kCount;
  Bits part[kCount];
  static BNKERN_INLINE ArrayMask from_bits(std::uint16_t bits) {
    ArrayMask m;
    for (int k = 0; k < kCount; ++k) {
      Bits bit{};
      for (int i = 0; i < kWidth; ++i) bit[i] = 1 << (k * kWidth + i);
      m.part[k] = ((Bits{} + bits) & bit) != 0;
    }
    return m;
  }
  BNKERN_INLINE bool operator[](int lane) const { return part[lane / kWidth][lane % kWidth] != 0; }
  BNKERN_INLINE std::uint16_t bits() const {
    std::uint16_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint16_t>((*this)[i]) << i;
    return bits;
  }
};

template <class A>
struct ArrayVec : Registers<A> {
  using typename Registers<A>::Register, typename Registers<A>::Bits;
  using Registers<A>::kCount, Registers<A>::kWidth;
  using Mask = ArrayMask<A>;
  Register part[kCount];
  static BNKERN_INLINE ArrayVec all(A value) {
    ArrayVec v;
    for (Register& part : v.part) part = Register{} + value;
    return v;
  }
  static BNKERN_INLINE ArrayVec load(const A* p) {
    ArrayVec v;
    std::memcpy(v.part, p, sizeof v.part);
    return v;
  }
  BNKERN_INLINE void store(A* p) const { std::memcpy(p, part, sizeof part); }
  BNKERN_INLINE void stream(A* p) const { store(p); }
#define BNKERN_LANEWISE(name, expression)                             \
  friend BNKERN_INLINE ArrayVec name(ArrayVec left, ArrayVec right) { \
    for (int k = 0; k < kCount; ++k) {                                \
      const Register a = left.part[k], b = right.part[k];             \
      left.part[k] = expression;                                      \
    }                                                                 \
    return left;                                                      \
  }
  BNKERN_LANEWISE(operator+, a + b)
  BNKERN_LANEWISE(operator-, a - b)
  BNKERN_LANEWISE(operator*, a* b)
  BNKERN_LANEWISE(least, a < b ? a : b)
  BNKERN_LANEWISE(largest, a > b ? a : b)
#undef BNKERN_LANEWISE
  friend BNKERN_INLINE ArrayVec fma(ArrayVec a, ArrayVec b, ArrayVec c) {
    for (int k = 0; k < kCount; ++k) c.part[k] = multiply_add(a.part[k], b.part[k], c.part[k]);
    return c;
  }
  // The lanes with not (v <= 0). NaN is among them, as in torch's threshold_backward.
  BNKERN_INLINE Mask above_zero() const {
    return mask_of([](Register v) __attribute__((always_inline)) { return ~(v <= 0); });
  }
  // The lanes with not (v >= 0). NaN is among them.
  BNKERN_INLINE Mask below_zero() const {
    return mask_of([](Register v) __attribute__((always_inline)) { return ~(v >= 0); });
  }
  BNKERN_INLINE ArrayVec keep(Mask m) const {
    ArrayVec v;
    for (int k = 0; k < kCount; ++k) v.part[k] = (Register)((Bits)part[k] & m.part[k]);
    return v;
  }
  BNKERN_INLINE ArrayVec magnitude() const {
    ArrayVec v;
    const Bits sign = (Bits)(-Register{});  // -0 is the sign bit alone
    for (int k = 0; k < kCount; ++k) v.part[k] = (Register)((Bits)part[k] & ~sign);
    return v;
  }
  // For counts, which are never -0. They add b in the lanes where d is above zero, below zero, zero, or infinite or
  // NaN, or they add the sign of d. NaN is in none of the first three cases and has sign 0.
#define BNKERN_COUNT(name, condition)                                                                          \
  BNKERN_INLINE ArrayVec name(ArrayVec d, ArrayVec b) const {                                                  \
    return *this + b.keep(d.mask_of([](Register v) __attribute__((always_inline)) { return v condition 0; })); \
  }
  BNKERN_COUNT(plus_where_positive, >)
  BNKERN_COUNT(plus_where_negative, <)
  BNKERN_COUNT(plus_where_zero, ==)
#undef BNKERN_COUNT
  BNKERN_INLINE ArrayVec plus_where_nonfinite(ArrayVec d, ArrayVec b) const {
    return *this + b.keep(d.mask_of([](Register v) __attribute__((always_inline)) { return ~(v - v == 0); }));
  }
  BNKERN_INLINE ArrayVec plus_sign(ArrayVec d) const {
    return plus_where_positive(d, all(1)).plus_where_negative(d, all(-1));
  }

 private:
  template <class F>
  BNKERN_INLINE Mask mask_of(F f) const {
    Mask m;
    for (int k = 0; k < kCount; ++k) m.part[k] = f(part[k]);
    return m;
  }
  static BNKERN_INLINE Register multiply_add(Register a, Register b, Register c) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, double>) return (Register)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<A, double>) return (Register)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
    for (int i = 0; i < kWidth; ++i) c[i] = bnkern::fma(a[i], b[i], c[i]);
    return c;
  }
};

template <class A>
struct VecOf;
template <>
struct VecOf<double> {
  using type = ArrayVec<double>;
};

// ------------------------------------------------------------------------------------------------ AVX-512

#if defined(__AVX512F__)

struct Mask512 {
  __mmask16 m;
  static BNKERN_INLINE Mask512 from_bits(std::uint16_t bits) { return {bits}; }
  BNKERN_INLINE std::uint16_t bits() const { return m; }
};

struct FloatVec {
  using Mask = Mask512;
  __m512 v;
  static BNKERN_INLINE FloatVec all(float value) { return {_mm512_set1_ps(value)}; }
  static BNKERN_INLINE FloatVec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  BNKERN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  BNKERN_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  friend BNKERN_INLINE FloatVec operator+(FloatVec a, FloatVec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend BNKERN_INLINE FloatVec operator-(FloatVec a, FloatVec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend BNKERN_INLINE FloatVec operator*(FloatVec a, FloatVec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend BNKERN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  BNKERN_INLINE Mask above_zero() const { return {_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ)}; }
  BNKERN_INLINE Mask below_zero() const { return {_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NGE_UQ)}; }
  BNKERN_INLINE FloatVec keep(Mask m) const { return {_mm512_maskz_mov_ps(m.m, v)}; }
  BNKERN_INLINE FloatVec magnitude() const { return {_mm512_abs_ps(v)}; }
  template <int relation>
  BNKERN_INLINE FloatVec plus_where(FloatVec d, FloatVec b) const {
    return {_mm512_mask_add_ps(v, _mm512_cmp_ps_mask(d.v, _mm512_setzero_ps(), relation), v, b.v)};
  }
  BNKERN_INLINE FloatVec plus_where_positive(FloatVec d, FloatVec b) const { return plus_where<_CMP_GT_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_negative(FloatVec d, FloatVec b) const { return plus_where<_CMP_LT_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_zero(FloatVec d, FloatVec b) const { return plus_where<_CMP_EQ_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_nonfinite(FloatVec d, FloatVec b) const {
    constexpr int kNonfinite = 0x99;  // both infinities, quiet and signalling NaN
    return {_mm512_mask_add_ps(v, _mm512_fpclass_ps_mask(d.v, kNonfinite), v, b.v)};
  }
  BNKERN_INLINE FloatVec plus_sign(FloatVec d) const {
    const __m512 sign = _mm512_or_ps(_mm512_and_ps(d.v, _mm512_set1_ps(-0.0f)), _mm512_set1_ps(1));
    return plus_where<_CMP_NEQ_OQ>(d, {sign});
  }
  friend BNKERN_INLINE FloatVec least(FloatVec a, FloatVec b) { return {_mm512_maskz_min_ps(0xffff, a.v, b.v)}; }
  friend BNKERN_INLINE FloatVec largest(FloatVec a, FloatVec b) { return {_mm512_maskz_max_ps(0xffff, a.v, b.v)}; }
};

// --------------------------------------------------------------------------------------------------- AVX2

#elif defined(__AVX2__)

struct Mask256 {
  __m256 lo, hi;
  static BNKERN_INLINE __m256 half(int bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane));
  }
  static BNKERN_INLINE Mask256 from_bits(std::uint16_t bits) { return {half(bits), half(bits >> 8)}; }
  BNKERN_INLINE std::uint16_t bits() const {
    return static_cast<std::uint16_t>(_mm256_movemask_ps(lo) | _mm256_movemask_ps(hi) << 8);
  }
};

struct FloatVec {
  using Mask = Mask256;
  __m256 lo, hi;
  static BNKERN_INLINE FloatVec all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static BNKERN_INLINE FloatVec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  BNKERN_INLINE void store(float* p) const {
    _mm256_storeu_ps(p, lo);
    _mm256_storeu_ps(p + 8, hi);
  }
  BNKERN_INLINE void stream(float* p) const {
    _mm256_stream_ps(p, lo);
    _mm256_stream_ps(p + 8, hi);
  }
  friend BNKERN_INLINE FloatVec operator+(FloatVec a, FloatVec b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  friend BNKERN_INLINE FloatVec operator-(FloatVec a, FloatVec b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
  }
  friend BNKERN_INLINE FloatVec operator*(FloatVec a, FloatVec b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  friend BNKERN_INLINE FloatVec fma(FloatVec a, FloatVec b, FloatVec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
  }
  BNKERN_INLINE Mask above_zero() const {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_cmp_ps(lo, zero, _CMP_NLE_UQ), _mm256_cmp_ps(hi, zero, _CMP_NLE_UQ)};
  }
  BNKERN_INLINE Mask below_zero() const {
    const __m256 zero = _mm256_setzero_ps();
    return {_mm256_cmp_ps(lo, zero, _CMP_NGE_UQ), _mm256_cmp_ps(hi, zero, _CMP_NGE_UQ)};
  }
  BNKERN_INLINE FloatVec keep(Mask m) const { return {_mm256_and_ps(m.lo, lo), _mm256_and_ps(m.hi, hi)}; }
  BNKERN_INLINE FloatVec magnitude() const {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, lo), _mm256_andnot_ps(sign, hi)};
  }
  template <int relation>
  BNKERN_INLINE FloatVec plus_where(FloatVec d, FloatVec b) const {
    const __m256 zero = _mm256_setzero_ps();
    return *this + b.keep({_mm256_cmp_ps(d.lo, zero, relation), _mm256_cmp_ps(d.hi, zero, relation)});
  }
  BNKERN_INLINE FloatVec plus_where_positive(FloatVec d, FloatVec b) const { return plus_where<_CMP_GT_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_negative(FloatVec d, FloatVec b) const { return plus_where<_CMP_LT_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_zero(FloatVec d, FloatVec b) const { return plus_where<_CMP_EQ_OQ>(d, b); }
  BNKERN_INLINE FloatVec plus_where_nonfinite(FloatVec d, FloatVec b) const {
    return plus_where<_CMP_NEQ_UQ>(d - d, b);
  }
  BNKERN_INLINE FloatVec plus_sign(FloatVec d) const {
    const __m256 sign = _mm256_set1_ps(-0.0f), one = _mm256_set1_ps(1);
    return plus_where<_CMP_NEQ_OQ>(
        d, {_mm256_or_ps(_mm256_and_ps(d.lo, sign), one), _mm256_or_ps(_mm256_and_ps(d.hi, sign), one)});
  }
  friend BNKERN_INLINE FloatVec least(FloatVec a, FloatVec b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
  }
  friend BNKERN_INLINE FloatVec largest(FloatVec a, FloatVec b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
};

#else

using FloatVec = ArrayVec<float>;

#endif

template <>
struct VecOf<float> {
  using type = FloatVec;
};
template <class A>
using Vec = typename VecOf<A>::type;

// Whether a vector is an array of the compiler's vector types. Its code is longer and slower to compile, so fewer
// instances are compiled and kernels unroll less.
template <class A>
constexpr bool kArrayVec = std::is_same_v<Vec<A>, ArrayVec<A>>;

// A mask of the lanes below n.
template <class V>
BNKERN_INLINE typename V::Mask first_lanes(int n) {
  return V::Mask::from_bits(static_cast<std::uint16_t>((1 << n) - 1));
}

// Reduce the lanes in a fixed tree to their sum, their minimum or their maximum.
template <class A, class F>
BNKERN_INLINE A fold(Vec<A> v, F f) {
  A lane[kLanes];
  v.store(lane);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] = f(lane[i], lane[i + half]);
  return lane[0];
}
template <class A>
BNKERN_INLINE A sum(Vec<A> v) {
  return fold<A>(v, [](A a, A b) __attribute__((always_inline)) { return a + b; });
}
template <class A>
BNKERN_INLINE A least_lane(Vec<A> v) {
  return fold<A>(v, [](A a, A b) __attribute__((always_inline)) { return bnkern::least(a, b); });
}
template <class A>
BNKERN_INLINE A largest_lane(Vec<A> v) {
  return fold<A>(v, [](A a, A b) __attribute__((always_inline)) { return bnkern::largest(a, b); });
}

}  // namespace bnkern::BNKERN_ISA
