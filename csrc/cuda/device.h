// Functions of all batch norm kernels: octets of a tensor, channel vectors, and sums over a block.
#pragma once

#include <type_traits>

#include "exchange.h"
#include "kernels.h"

namespace bnkern {

// --------------------------------------------------------------------------------------------------- octets
//
// Eight adjacent values of storage type. They have one byte of the mask, and are read by one or two loads of 16 bytes.

template <class T>
struct Octet {
  static constexpr int kWords = sizeof(T) / 2;  // the number of Words, of 16 bytes each
  Words words[kWords];

  BNKERN_DEVICE float operator[](int j) const;
  static BNKERN_DEVICE Octet of(const float (&value)[8]);
  BNKERN_DEVICE void clear(int j);  // sets value j to +0
  static BNKERN_DEVICE Octet load(const T* p) {
    Octet octet;
#pragma unroll
    for (int i = 0; i < kWords; ++i) octet.words[i] = load_words(reinterpret_cast<const Words*>(p) + i);
    return octet;
  }
  BNKERN_DEVICE void store(T* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_words(reinterpret_cast<Words*>(p) + i, words[i]);
  }
};

BNKERN_DEVICE float float_of(std::uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}
BNKERN_DEVICE std::uint32_t bits_of(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(std::uint32_t, value);
#endif
}

template <class T>
BNKERN_DEVICE float Octet<T>::operator[](int j) const {
  if constexpr (sizeof(T) == 4) {
    return float_of(words[j / 4].word[j % 4]);
  } else {
    return widen(T{static_cast<std::uint16_t>(words[0].word[j / 2] >> (j % 2 * 16))});
  }
}
template <class T>
BNKERN_DEVICE Octet<T> Octet<T>::of(const float (&value)[8]) {
  Octet octet;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if constexpr (sizeof(T) == 4) {
      octet.words[j / 4].word[j % 4] = bits_of(value[j]);
    } else if (j % 2 == 0) {
      octet.words[0].word[j / 2] = pack_two(value[j], value[j + 1], static_cast<T*>(nullptr));
    }
  }
  return octet;
}
template <class T>
BNKERN_DEVICE void Octet<T>::clear(int j) {
  if constexpr (sizeof(T) == 4) {
    words[j / 4].word[j % 4] = 0;
  } else {
    words[0].word[j / 2] &= j % 2 ? 0x0000ffffu : 0xffff0000u;
  }
}

// The bit of the mask for a value z, rounded to the storage type. NaN counts as positive, as in torch's ReLU.
BNKERN_DEVICE bool positive(float stored) { return !(stored <= 0); }

// Applies an activation to value j of an octet. The value is a z that is not positive, or the gradient at such a z.
template <class T>
BNKERN_DEVICE void activate(Activation act, Octet<T>* octet, int j) {
  switch (act) {
    case Activation::relu:
      return octet->clear(j);
    case Activation::none:
      break;
  }
  __builtin_unreachable();  // the caller has tested for none
}
// The same for one value.
template <class T>
BNKERN_DEVICE T activate(Activation act, T) {
  switch (act) {
    case Activation::relu:
      return T{};
    case Activation::none:
      break;
  }
  __builtin_unreachable();
}

// Applies an activation to eight values z, and returns their mask.
template <class T>
BNKERN_DEVICE unsigned activate(Activation act, Octet<T>* octet) {
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (positive((*octet)[j]))
      bits |= 1u << j;
    else
      activate(act, octet, j);
  }
  return bits;
}

// Computes eight gradients before the activation from those after it and the mask.
template <class T>
BNKERN_DEVICE void activate_gradient(Activation act, Octet<T>* octet, unsigned bits) {
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (!(bits >> j & 1)) activate(act, octet, j);
}

// Rounds one value, for kernels that do not use octets.
template <class T>
BNKERN_DEVICE T narrow(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else {
    return T{static_cast<std::uint16_t>(pack_two(value, value, static_cast<T*>(nullptr)))};
  }
}

// ------------------------------------------------------------------------------------------ integers and counts

// Computes n / d by a multiplication. It is exact for n < 2^31 (Granlund and Montgomery 1994).
struct Divider {
  std::uint32_t divisor, multiplier, shift;

  static Divider of(std::int64_t d) {
    std::uint32_t bits = 0;
    while ((std::int64_t(1) << bits) < d) ++bits;
    const std::uint64_t power = std::uint64_t(1) << (31 + bits);
    return {static_cast<std::uint32_t>(d), static_cast<std::uint32_t>((power + d - 1) / d), 31 + bits};
  }
  BNKERN_DEVICE std::uint32_t divide(std::uint32_t n) const {
    return static_cast<std::uint32_t>((std::uint64_t(n) * multiplier) >> shift);
  }
};

// A number of values with its reciprocals, because a division in double takes dozens of instructions.
struct Count {
  double values, inverse, unbiased;  // n, 1 / n, 1 / (n - 1)

  static Count of(std::int64_t n) {
    const double values = static_cast<double>(n);
    return {values, 1 / values, 1 / (values - 1)};
  }
};
BNKERN_DEVICE Moments<double> moments_of(const Count& count, PivotSums sums) {
  const double mean = sums.first * count.inverse, m2 = fma(-sums.first, mean, sums.second);
  return {count.values, mean, m2 < 0 ? 0 : m2};  // rounding may make it negative; NaN stays NaN
}

// ------------------------------------------------------------------------------------------ channel vectors

BNKERN_DEVICE float read(const ChannelVector& v, std::int64_t c, float absent) {
  if (!v) return absent;
  switch (v.dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(v.data)[c]);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(v.data)[c]);
    default:
      return static_cast<const float*>(v.data)[c];
  }
}
BNKERN_DEVICE void write(const ChannelVector& v, std::int64_t c, double value) {
  if (!v) return;
  const float rounded = static_cast<float>(value);
  switch (v.dtype) {
    case DType::kBFloat16:
      static_cast<BFloat16*>(v.data)[c] = narrow<BFloat16>(rounded);
      break;
    case DType::kFloat16:
      static_cast<Float16*>(v.data)[c] = narrow<Float16>(rounded);
      break;
    default:
      static_cast<float*>(v.data)[c] = rounded;
  }
}

// Reads a vector of the accumulator type, [C]. If it is null, all channels have the value `absent`.
BNKERN_DEVICE float read(const void* v, std::int64_t c, float absent) {
  return v ? static_cast<const float*>(v)[c] : absent;
}

// The coefficients by which an element is normalised.
struct alignas(16) Affine {
  float mean, invstd, weight, bias;
};
template <class Call>  // Forward or Backward
BNKERN_DEVICE Affine affine(const Call& p, std::int64_t c, float mean, float invstd) {
  return {mean, invstd, read(p.weight, c, 1.0f), read(p.bias, c, 0.0f)};
}
BNKERN_DEVICE float normalized(float x, const Affine& coefficients) {
  return scale_shift(standardize(x, coefficients.mean, coefficients.invstd), coefficients.weight, coefficients.bias);
}

// The mask of eight values or of one. It repeats the arithmetic of the forward, so the bits are the same.
template <class T, class Values, int W>
BNKERN_DEVICE unsigned recomputed_mask(const Values& x, const Affine (&coefficients)[W]) {
  if constexpr (W == 1) {
    return positive(widen(narrow<T>(normalized(x[0], coefficients[0]))));
  } else {
    float z[W];
#pragma unroll
    for (int j = 0; j < W; ++j) z[j] = normalized(x[j], coefficients[j]);
    const auto stored = Octet<T>::of(z);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < W; ++j) bits |= unsigned(positive(stored[j])) << j;
    return bits;
  }
}

// Eight values of y, and the bits of their mask if the call has an activation.
template <class T>
BNKERN_DEVICE Octet<T> normalized_octet(const Forward& p, const Affine (&coefficients)[8], const Octet<T>& x,
                                        const Octet<T>& residual, unsigned* bits) {
  float z[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) z[j] = normalized(x[j], coefficients[j]);
  if (p.residual) {
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] += residual[j];
  }
  auto octet = Octet<T>::of(z);
  if (p.act != Activation::none) *bits = activate(p.act, &octet);
  return octet;
}

// dx of an element. `mean` has the means of g and of g * xhat, and is read only in training mode.
BNKERN_DEVICE float gradient_of_input(const Backward& p, float g, float x, const Affine& coefficients, Pair mean) {
  const float scale = coefficients.weight * coefficients.invstd;
  if (!p.training) return g * scale;
  return input_gradient(g, standardize(x, coefficients.mean, coefficients.invstd), mean.first, mean.second, scale);
}

// ------------------------------------------------------------------------------------------ sums over a block

// How the threads of a block add up the parts of `width` channels. Each channel has 2^bits chains. A chain is a thread
// that adds up every 2^bits-th part. Then 2^bits neighbouring lanes of a warp add up the chains of a channel by a tree.
// The first of these lanes is the channel's owner, which receives the sums.
struct Chains {
  Divider width;
  int bits;

  static constexpr int kMost = 32;  // the lanes of a warp
  static Chains of(int width, int threads) {
    int bits = 0;
    while ((2 << bits) <= kMost && (2 << bits) * width <= threads) ++bits;
    return {Divider::of(width), bits};
  }
  // The elements of the memory in which the chains leave their sums.
  static BNKERN_HD int scratch(int threads) { return threads + kMost; }
  // The chain of this thread, and the channel of its parts. It adds up nothing if the chain is not less than 2^bits.
  BNKERN_DEVICE int chain() const { return static_cast<int>(width.divide(threadIdx.x)); }
  BNKERN_DEVICE int channel() const {
    return static_cast<int>(threadIdx.x - width.divide(threadIdx.x) * width.divisor);
  }
  // The channel that this thread owns, or -1.
  BNKERN_DEVICE int owned() const {
    const int t = static_cast<int>(threadIdx.x), channel = t >> bits;
    return (t & ((1 << bits) - 1)) == 0 && channel < static_cast<int>(width.divisor) ? channel : -1;
  }
};

// The lanes of this thread's warp as a mask. The last warp of a block may have fewer than 32.
BNKERN_DEVICE unsigned lanes_of_warp() {
  const unsigned left = blockDim.x - (threadIdx.x & ~31u);
  return left < 32 ? (1u << left) - 1 : 0xffffffffu;
}

// Computes the sums of `parts` parts for each channel, in double and in a fixed order. load(k, c) loads part k of
// channel c, convert(k, part) converts it to sums that can be added, and the channel's owner calls done(c, sums). The
// loads of kInFlight parts are issued before the first is used. For this the index of a part is clamped instead of
// tested, because a branch would keep each load behind the one before it. Every thread of the block must call this
// function.
template <class Load, class Convert, class Done>
BNKERN_DEVICE void sum_over_block(const Chains& chains, int parts, PivotSums* scratch, Load load, Convert convert,
                                  Done done) {
  constexpr int kInFlight = 8;
  const int t = static_cast<int>(threadIdx.x), width = static_cast<int>(chains.width.divisor), count = 1 << chains.bits;
  const int chain = chains.chain(), c = chains.channel();
  PivotSums sums{0, 0};
  if (chain < count) {
#pragma unroll 1
    for (int first = chain; first < parts; first += kInFlight * count) {
      decltype(load(0, 0)) part[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = first + i * count;
        part[i] = load(k < parts ? k : parts - 1, c);
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int k = first + i * count;
        const PivotSums more = convert(k, part[i]);
        if (k < parts) sums.first += more.first, sums.second += more.second;
      }
    }
    // A row is one element longer than the width, so lanes that read one channel use different banks.
    scratch[chain * (width + 1) + c] = sums;
  }
  __syncthreads();
  const int channel = t >> chains.bits, lane = t & (count - 1);
  if (channel < width) sums = scratch[lane * (width + 1) + channel];
  const unsigned lanes = lanes_of_warp();
#pragma unroll 1
  for (int step = count / 2; step > 0; step /= 2) {
    sums.first += __shfl_down_sync(lanes, sums.first, step);
    sums.second += __shfl_down_sync(lanes, sums.second, step);
  }
  if (lane == 0 && channel < width) done(channel, sums);
}

// ------------------------------------------------------------------------------------------------- workspace

constexpr int kGroups = 4096;  // the largest number of groups of blocks that exchange parts

// The signals, then the parts, then one pair per channel.
struct Workspace {
  unsigned *counting, *barriers, *arrivals;  // [1] for all groups together; [groups]; [groups]
  Partials parts;
  Pair* totals;
};
inline std::int64_t pairs_bytes(std::int64_t parts, std::int64_t channels) {
  return (parts + 1) * channels * static_cast<std::int64_t>(sizeof(Pair));
}
// The address of the parts. It depends only on the workspace, not on the call, so a word that was written as data of a
// part is never used as a signal later.
inline char* behind_signals(const CudaWorkspace& memory) {
  return static_cast<char*>(memory.data) + signal_bytes(memory.size.groups);
}
inline Workspace lay_out(const CudaWorkspace& memory, std::int64_t parts, std::int64_t channels) {
  unsigned* const words = static_cast<unsigned*>(memory.data);
  Pair* const pairs = reinterpret_cast<Pair*>(behind_signals(memory));
  return {words, words + 1, words + 1 + memory.size.groups, {pairs, channels}, pairs + parts * channels};
}
// A block that is alone in its group needs no signals.
inline WorkspaceSize workspace_size(std::int64_t groups, std::int64_t parts, std::int64_t channels,
                                    std::int64_t record_bytes) {
  return {parts > 1 ? groups : 0, pairs_bytes(parts, channels) + record_bytes};
}

// ------------------------------------------------------------------------------------------------- on the host

template <class P>
using Pointee = std::remove_pointer_t<P>;

// with_dtype() for the types of the CUDA kernels, which do not support float64.
template <class F>
auto with_half_or_float(DType dtype, F f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace bnkern
