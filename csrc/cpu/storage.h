// Conversion between the values of a tensor in memory and vectors of 16 lanes.
//
//   Packed<T>                 16 values, rounded to nearest even as in torch; wide() returns their lanes
//   load<T>, load_some<T>     load 16 values, or the first n with zeros or a given value in the other lanes
//   load_two<T>               loads 32 values in an order that is fast to produce; put_in_order<T> restores the order
//   put<T>, put_some<T>       store 16 values, or the first n
#pragma once

#include "../dtype.h"
#include "simd.h"

namespace bnkern::BNKERN_ISA {

// ------------------------------------------------------------------------------------- conversion and rounding

#if defined(__AVX2__)
using HalfLanes = __m256i;  // 16 lanes of 16 bits
#endif

#if defined(__AVX512F__)
BNKERN_INLINE FloatVec widen(HalfLanes h, BFloat16*) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
BNKERN_INLINE FloatVec widen(HalfLanes h, Float16*) { return {_mm512_cvtph_ps(h)}; }
BNKERN_INLINE HalfLanes narrow(FloatVec a, BFloat16*) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_srli_epi32(_mm512_set1_epi32(0x7fc0), number, rounded, 16));
}
BNKERN_INLINE HalfLanes narrow(FloatVec a, Float16*) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__AVX2__)
BNKERN_INLINE FloatVec widen(HalfLanes h, BFloat16*) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
BNKERN_INLINE FloatVec widen(HalfLanes h, Float16*) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
BNKERN_INLINE __m256i bfloat16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}
BNKERN_INLINE HalfLanes narrow(FloatVec a, BFloat16*) {
  // packus works within 128-bit halves. The permutation restores the order of the quarters.
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(a.lo), bfloat16_bits(a.hi));
  return _mm256_permute4x64_epi64(packed, 0xd8);
}
BNKERN_INLINE HalfLanes narrow(FloatVec a, Float16*) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return _mm256_set_m128i(_mm256_cvtps_ph(a.hi, nearest), _mm256_cvtps_ph(a.lo, nearest));
}
#endif

BNKERN_INLINE float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
BNKERN_INLINE std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Conversions of one value, for channel vectors and for machines without vector conversions.
BNKERN_INLINE float widen(BFloat16 h) { return bits_to_float(std::uint32_t{h.bits} << 16); }
BNKERN_INLINE float widen(Float16 h) {
  const std::uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31u, digits = h.bits & 0x3ffu;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | digits << 13);
  if (exponent) return bits_to_float(sign | (exponent + 112) << 23 | digits << 13);
  const float tiny = static_cast<float>(digits) * 0x1p-24f;  // a subnormal value, converted exactly
  return sign ? -tiny : tiny;
}
BNKERN_INLINE float widen(float value) { return value; }
BNKERN_INLINE double widen(double value) { return value; }

BNKERN_INLINE void narrow(float value, BFloat16* out) {
  const std::uint32_t bits = float_to_bits(value);
  out->bits = value != value ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
BNKERN_INLINE void narrow(float value, Float16* out) {
  const std::uint32_t bits = float_to_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  std::uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00u | (size >> 13 & 0x3ffu);  // a quiet NaN that keeps the upper bits of the payload, as in F16C
  } else if (size >= 0x477ff000u) {
    half = 0x7c00u;  // rounds to infinity
  } else if (size < 0x38800000u) {
    // The result is subnormal. The addition aligns its digits with those of 0.5 and rounds to nearest even.
    half = float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<std::uint16_t>(sign | half);
}
BNKERN_INLINE void narrow(float value, float* out) { *out = value; }
BNKERN_INLINE void narrow(double value, double* out) { *out = value; }

// ----------------------------------------------------------------------------------------------- in and out

BNKERN_INLINE Vec<float> load(const float* p) { return Vec<float>::load(p); }
BNKERN_INLINE Vec<double> load(const double* p) { return Vec<double>::load(p); }

// A vector in its form in memory. above_zero() is the mask of not (value <= 0), which includes NaN.
template <class T>
struct Packed {  // float and double are stored without conversion
  using V = Vec<T>;
  V v;
  static BNKERN_INLINE Packed of(V v) { return {v}; }
  static BNKERN_INLINE Packed read(const T* p) { return {V::load(p)}; }
  BNKERN_INLINE void store(T* p) const { v.store(p); }
  BNKERN_INLINE void stream(T* p) const { v.stream(p); }
  BNKERN_INLINE typename V::Mask above_zero() const { return v.above_zero(); }
  BNKERN_INLINE Packed keep(typename V::Mask m) const { return {v.keep(m)}; }
  BNKERN_INLINE V wide() const { return v; }
};

#if defined(__AVX2__)

template <class T>
BNKERN_INLINE Vec<float> load(const T* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), static_cast<T*>(nullptr));
}

template <class T>
struct PackedHalf {
  HalfLanes h;
  static BNKERN_INLINE PackedHalf of(Vec<float> v) { return {narrow(v, static_cast<T*>(nullptr))}; }
  static BNKERN_INLINE PackedHalf read(const T* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  BNKERN_INLINE void store(T* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h); }
  BNKERN_INLINE void stream(T* p) const { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), h); }
  BNKERN_INLINE Vec<float> wide() const { return widen(h, static_cast<T*>(nullptr)); }
  // Compares the stored bits as signed integers. They are above zero for a value above zero, and for a NaN whose sign
  // bit is 0. Rounding to bfloat16 gives only such NaNs. Rounding to float16 keeps the sign bit of a NaN, so float16
  // needs a second comparison.
#if defined(__AVX512F__)
  BNKERN_INLINE Mask512 above_zero() const {
    __mmask16 m = _mm256_cmpgt_epi16_mask(h, _mm256_setzero_si256());
    if constexpr (std::is_same_v<T, Float16>)
      m |= _mm256_cmpgt_epi16_mask(_mm256_and_si256(h, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16(0x7c00));
    return {m};
  }
  BNKERN_INLINE PackedHalf keep(Mask512 m) const { return {_mm256_maskz_mov_epi16(m.m, h)}; }
#else
  BNKERN_INLINE Mask256 above_zero() const {
    __m256i m = _mm256_cmpgt_epi16(h, _mm256_setzero_si256());
    if constexpr (std::is_same_v<T, Float16>)
      m = _mm256_or_si256(
          m, _mm256_cmpgt_epi16(_mm256_and_si256(h, _mm256_set1_epi16(0x7fff)), _mm256_set1_epi16(0x7c00)));
    return {_mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(m))),
            _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(m, 1)))};
  }
  BNKERN_INLINE PackedHalf keep(Mask256 m) const {
    const __m256i packed = _mm256_packs_epi32(_mm256_castps_si256(m.lo), _mm256_castps_si256(m.hi));
    return {_mm256_and_si256(h, _mm256_permute4x64_epi64(packed, 0xd8))};
  }
#endif
};

#else

template <class T>
BNKERN_INLINE Vec<float> load(const T* p) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = widen(p[i]);
  return Vec<float>::load(lanes);
}

template <class T>
struct PackedHalf {
  T lane[kLanes];
  static BNKERN_INLINE PackedHalf of(Vec<float> v) {
    PackedHalf packed;
    float lanes[kLanes];
    v.store(lanes);
    for (int i = 0; i < kLanes; ++i) narrow(lanes[i], packed.lane + i);
    return packed;
  }
  static BNKERN_INLINE PackedHalf read(const T* p) {
    PackedHalf packed;
    std::memcpy(packed.lane, p, sizeof packed.lane);
    return packed;
  }
  BNKERN_INLINE void store(T* p) const { std::memcpy(p, lane, sizeof lane); }
  BNKERN_INLINE void stream(T* p) const { store(p); }
  BNKERN_INLINE Vec<float> wide() const { return load(lane); }
  BNKERN_INLINE Vec<float>::Mask above_zero() const { return wide().above_zero(); }
  BNKERN_INLINE PackedHalf keep(Vec<float>::Mask m) const {
    PackedHalf kept = *this;
    for (int i = 0; i < kLanes; ++i) kept.lane[i].bits = m[i] ? lane[i].bits : 0;
    return kept;
  }
};

#endif

template <>
struct Packed<BFloat16> : PackedHalf<BFloat16> {
  static BNKERN_INLINE Packed of(Vec<float> v) { return {PackedHalf<BFloat16>::of(v)}; }
  static BNKERN_INLINE Packed read(const BFloat16* p) { return {PackedHalf<BFloat16>::read(p)}; }
  BNKERN_INLINE Packed keep(Vec<float>::Mask m) const { return {PackedHalf<BFloat16>::keep(m)}; }
};
template <>
struct Packed<Float16> : PackedHalf<Float16> {
  static BNKERN_INLINE Packed of(Vec<float> v) { return {PackedHalf<Float16>::of(v)}; }
  static BNKERN_INLINE Packed read(const Float16* p) { return {PackedHalf<Float16>::read(p)}; }
  BNKERN_INLINE Packed keep(Vec<float>::Mask m) const { return {PackedHalf<Float16>::keep(m)}; }
};

// Copies up to 16 values in pieces whose sizes are known at compile time.
template <class T>
BNKERN_INLINE void copy_some(T* to, const T* from, int n) {
#pragma GCC unroll 5
  for (int size = kLanes; size; size /= 2)
    if (n & size) {
      std::memcpy(to, from, size * sizeof(T));
      to += size, from += size;
    }
}

template <class T>
BNKERN_INLINE Vec<Accumulator<T>> load_some(const T* p, int n, T others = T{}) {
#if defined(__AVX512F__)
  const auto m = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return {_mm512_mask_loadu_ps(_mm512_set1_ps(others), m, p)};
  if constexpr (sizeof(T) == 2) {
    const HalfLanes h = _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(others.bits)), m, p);
    return widen(h, static_cast<T*>(nullptr));
  }
#endif
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = others;
  copy_some(lanes, p, n);
  return load(lanes);
}

// For bfloat16, to[0] gets the values at even indices and to[1] those at odd indices, because one shift and one AND
// separate a pair.
template <class T>
BNKERN_INLINE void load_two(const T* p, Vec<Accumulator<T>>* to) {
  if constexpr (!std::is_same_v<T, BFloat16>) {
    to[0] = load(p), to[1] = load(p + kLanes);
  } else {
#if defined(__AVX512F__)
    const __m512i pairs = _mm512_loadu_si512(p);
    to[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
    to[1] = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
#elif defined(__AVX2__)
    const __m256i lo = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i hi = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + kLanes));
    const __m256i odd = _mm256_set1_epi32(-65536);
    to[0] = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
    to[1] = {_mm256_castsi256_ps(_mm256_and_si256(lo, odd)), _mm256_castsi256_ps(_mm256_and_si256(hi, odd))};
#else
    float even[kLanes], odd[kLanes];
    for (int i = 0; i < kLanes; ++i) even[i] = widen(p[2 * i]), odd[i] = widen(p[2 * i + 1]);
    to[0] = Vec<float>::load(even), to[1] = Vec<float>::load(odd);
#endif
  }
}
template <class T, class A>
BNKERN_INLINE void put_in_order(A* values) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    A two[2 * kLanes];
    std::memcpy(two, values, sizeof two);
    for (int i = 0; i < kLanes; ++i) values[2 * i] = two[i], values[2 * i + 1] = two[kLanes + i];
  }
}

// Store a result: past the caches or through them, or only its first n lanes.
template <class T>
BNKERN_INLINE void put(T* p, Packed<T> packed, bool past_cache) {
  past_cache ? packed.stream(p) : packed.store(p);
}
template <class T>
BNKERN_INLINE void put_some(T* p, Packed<T> packed, int n) {
#if defined(__AVX512F__)
  const auto m = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(p, m, packed.v.v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, m, packed.h);
#endif
  T lanes[kLanes];
  packed.store(lanes);
  copy_some(p, lanes, n);
}

}  // namespace bnkern::BNKERN_ISA
