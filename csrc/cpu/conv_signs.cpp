// The sign sum and the number of nonzero summands of a convolution's weight gradient, by bits and their count.
//
// Each channel of dy, and each channel of x once per kernel column, is a pair of bit planes over positions: which
// values are present (not zero), and which are negative. A summand is present where both factors are, and negative
// where one of them is, so that per weight
//
//   nonzero = bits(present_dy & present_x),   sign_sum = nonzero - 2 bits((negative_dy ^ negative_x) & both present)
//
// Positions are in the order (row, image, column), each row of a block filled up to whole words with zeros: kernel
// row p then is an offset of p rows in a plane of x, and no bit is ever shifted. With a stride along rows x's rows
// form stride_h planes, one for each remainder of the row. NaN is present for `nonzero` and absent for `sign_sum`;
// a block that holds one is counted a second time.
#include <omp.h>

#include <type_traits>

#include "conv.h"

namespace bnkern::BNKERN_ISA {
namespace {

using Bits = std::uint64_t;
constexpr std::int64_t kWordBits = 64;
constexpr std::int64_t kWords = 8;               // what a plane's length is a multiple of
constexpr std::int64_t kLeastPositions = 2048;   // of a chunk
constexpr std::int64_t kBlockPositions = 8192;   // of a block
constexpr std::int64_t kBlockBytes = 768 << 10;  // of a block's planes
constexpr std::int64_t kAheadImages = 2;         // how many images' rows ahead memory is called for

// ------------------------------------------------------------------------------- counting bits, many at once

// kWide words of bits, or as many counters, to which `count` adds how many bits are set.
#if defined(__AVX512F__)
// kNative: by vpopcntq, which not every machine with the rest of AVX-512 has, and the compiler is not told of.
template <bool kNative>
struct WideBits {
  static constexpr int kWide = 8;
  __m512i v;
  static BNKERN_INLINE WideBits zero() { return {_mm512_setzero_si512()}; }
  static BNKERN_INLINE WideBits load(const Bits* p) { return {_mm512_loadu_si512(p)}; }
  friend BNKERN_INLINE WideBits operator&(WideBits a, WideBits b) { return {_mm512_and_si512(a.v, b.v)}; }
  friend BNKERN_INLINE WideBits operator^(WideBits a, WideBits b) { return {_mm512_xor_si512(a.v, b.v)}; }
  BNKERN_INLINE void count(WideBits bits) {
    __m512i counts;
    if constexpr (kNative) {
      asm("vpopcntq %1, %0" : "=v"(counts) : "v"(bits.v));
    } else {
      const __m512i nibble = _mm512_set1_epi8(15);
      const __m512i table = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
      const __m512i lo = _mm512_shuffle_epi8(table, _mm512_and_si512(bits.v, nibble));
      const __m512i hi = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(bits.v, 4), nibble));
      counts = _mm512_sad_epu8(_mm512_add_epi8(lo, hi), _mm512_setzero_si512());
    }
    v = _mm512_add_epi64(v, counts);
  }
  BNKERN_INLINE std::int64_t total() const { return _mm512_reduce_add_epi64(v); }
};
using PlainBits = WideBits<false>;
#elif defined(__AVX2__)
struct PlainBits {
  static constexpr int kWide = 4;
  __m256i v;
  static BNKERN_INLINE PlainBits zero() { return {_mm256_setzero_si256()}; }
  static BNKERN_INLINE PlainBits load(const Bits* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  friend BNKERN_INLINE PlainBits operator&(PlainBits a, PlainBits b) { return {_mm256_and_si256(a.v, b.v)}; }
  friend BNKERN_INLINE PlainBits operator^(PlainBits a, PlainBits b) { return {_mm256_xor_si256(a.v, b.v)}; }
  BNKERN_INLINE void count(PlainBits bits) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i table = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i lo = _mm256_shuffle_epi8(table, _mm256_and_si256(bits.v, nibble));
    const __m256i hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(bits.v, 4), nibble));
    v = _mm256_add_epi64(v, _mm256_sad_epu8(_mm256_add_epi8(lo, hi), _mm256_setzero_si256()));
  }
  BNKERN_INLINE std::int64_t total() const {
    alignas(32) std::int64_t lane[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), v);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
};
#else
struct PlainBits {
  static constexpr int kWide = 1;
  Bits v;
  static BNKERN_INLINE PlainBits zero() { return {0}; }
  static BNKERN_INLINE PlainBits load(const Bits* p) { return {*p}; }
  friend BNKERN_INLINE PlainBits operator&(PlainBits a, PlainBits b) { return {a.v & b.v}; }
  friend BNKERN_INLINE PlainBits operator^(PlainBits a, PlainBits b) { return {a.v ^ b.v}; }
  BNKERN_INLINE void count(PlainBits bits) { v += __builtin_popcountll(bits.v); }
  BNKERN_INLINE std::int64_t total() const { return static_cast<std::int64_t>(v); }
};
#endif

// ---------------------------------------------------------------------------------------------- making planes

// 64 positions' bits, one per channel, to 16 channels' words.
BNKERN_INLINE void turn(const std::uint16_t* positions, Bits* words) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_loadu_si512(positions), second = _mm512_loadu_si512(positions + 32);
  for (int half = 0; half < 2; ++half) {
    const auto bytes = [&](__m512i v) { return _mm512_cvtepi16_epi8(half ? _mm512_srli_epi16(v, 8) : v); };
    __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(bytes(first)), bytes(second), 1);
    for (int bit = 7; bit >= 0; --bit, v = _mm512_add_epi8(v, v)) words[8 * half + bit] = _mm512_movepi8_mask(v);
  }
#elif defined(__AVX2__)
  for (int half = 0; half < 2; ++half) {
    // 32 positions' bytes; packing goes within halves of registers, so that quarters are put back in order.
    const auto bytes = [&](const std::uint16_t* from) {
      const auto one = [&](int k) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
        return half ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
      };
      return _mm256_permute4x64_epi64(_mm256_packus_epi16(one(0), one(16)), 0xd8);
    };
    __m256i first = bytes(positions), second = bytes(positions + 32);
    for (int bit = 7; bit >= 0; --bit) {
      const auto low = static_cast<std::uint32_t>(_mm256_movemask_epi8(first));
      const auto high = static_cast<std::uint32_t>(_mm256_movemask_epi8(second));
      words[8 * half + bit] = low | static_cast<Bits>(high) << 32;
      first = _mm256_add_epi8(first, first), second = _mm256_add_epi8(second, second);
    }
  }
#else
  for (int c = 0; c < kLanes; ++c) words[c] = 0;
  for (int block = 0; block < 8; ++block)
    for (int half = 0; half < 2; ++half) {
      // An 8 x 8 matrix of bits, byte by byte, is transposed by exchanging blocks of 1, 2 and 4.
      Bits m = 0;
      for (int k = 0; k < 8; ++k) m |= static_cast<Bits>(positions[8 * block + k] >> 8 * half & 255) << 8 * k;
      const auto exchange = [&](int shift, Bits mask) {
        const Bits differing = (m ^ m >> shift) & mask;
        m ^= differing ^ differing << shift;
      };
      exchange(7, 0x00aa00aa00aa00aa);
      exchange(14, 0x0000cccc0000cccc);
      exchange(28, 0x00000000f0f0f0f0);
      for (int c = 0; c < 8; ++c) words[8 * half + c] |= (m >> 8 * c & 255) << 8 * block;
    }
#endif
}

// Planes of one tensor over a block, [channel][tap][remainder][row][word], those of present values first, then those
// of negative ones. A tap is a column of the kernel, a remainder one of the row modulo the stride.
struct Planes {
  std::int64_t channels, taps, remainders, rows, row_words;
  std::int64_t plane() const { return round_up(rows * row_words, kWords); }
  std::int64_t size() const { return channels * taps * remainders * plane(); }
  std::int64_t offset(std::int64_t channel, std::int64_t tap, std::int64_t remainder) const {
    return ((channel * taps + tap) * remainders + remainder) * plane();
  }
};

// Where the planes' rows and columns lie in the tensor: row r of a remainder is row (first_row + r * row_step +
// remainder), column w of a tap is column (w * column_step + tap - padding).
struct Lattice {
  std::int64_t first_row, row_step, column_step, padding, columns, read_columns;
};

// Words of scratch for one row of 16 channels: see `turned` below.
constexpr std::int64_t turned_size(std::int64_t row_words, std::int64_t taps) {
  return (row_words + 2) * kLanes + row_words * taps;
}

// Channels [first, first + planes.channels) of t over the images of a block. `all`: NaN is present too. Returns
// whether there is a NaN. `values` [read_columns][16], `marks` and `turned`, of turned_size(), are scratch.
//
// Where a convolution keeps the width, the tap that starts where the image does has all of the image's columns, and
// another tap is the same plane moved along, with zeros where it would meet the next image. Moving 64 columns at once
// is cheaper than turning them again.
template <class T>
bool make_planes(const Image& t, const Rectangle& block, const Lattice& lattice, const Planes& planes,
                 std::int64_t first, bool all, Bits* out, Accumulator<T>* values, std::uint16_t* marks, Bits* turned) {
  using A = Accumulator<T>;
  const std::int64_t run = planes.row_words * kWordBits, filled = block.images * lattice.columns;
  std::uint16_t *const column_marks = marks, *const runs = marks + 2 * lattice.read_columns;
  const bool move = lattice.column_step == 1 && t.w == lattice.columns && planes.taps > 1 && planes.taps < kWordBits;
  const std::int64_t first_made = move ? lattice.padding : 0, end_made = move ? first_made + 1 : planes.taps;
  // A row's words of 16 channels, and zeros before and after; then for each tap the columns that do not leave an image.
  Bits *const words = turned + kLanes, *const inside = words + (planes.row_words + 1) * kLanes;
  std::fill(turned, words, Bits{0});
  std::fill(inside - kLanes, inside + planes.taps * planes.row_words, Bits{0});
  for (std::int64_t tap = 0; move && tap < planes.taps; ++tap)
    for (std::int64_t k = 0; k < filled; ++k) {
      const std::int64_t column = k % lattice.columns + tap - lattice.padding;
      const Bits is_inside = column >= 0 && column < lattice.columns;
      inside[tap * planes.row_words + k / kWordBits] |= is_inside << k % kWordBits;
    }
  unsigned any_nan = 0;
  for (std::int64_t tap = 0; tap < 2 * planes.taps; ++tap)
    std::fill(runs + tap * run + filled, runs + (tap + 1) * run, std::uint16_t{0});
  // What a plane has beyond its rows.
  for (std::int64_t k = planes.rows * planes.row_words; k < planes.plane(); ++k)
    for (std::int64_t plane = 0; plane < 2 * planes.channels * planes.taps * planes.remainders; ++plane)
      out[plane * planes.plane() + k] = 0;

  std::uint16_t *const present = column_marks, *const negative = column_marks + lattice.read_columns;
  for (std::int64_t c = 0; c < planes.channels; c += kLanes) {
    const std::int64_t width = std::min<std::int64_t>(kLanes, planes.channels - c);
    const unsigned own = (1u << width) - 1;
    // First what is above zero and what is below, NaN being both; once a row is read, what they say, many at a time.
    const auto mark = [&](std::int64_t k, Vec<A> v) {
      present[k] = v.above_zero().bits();
      negative[k] = (Vec<A>::all(0) - v).above_zero().bits();
    };
    const auto settle = [&](std::int64_t begin, std::int64_t end) {
      unsigned nan = 0;
      for (std::int64_t k = begin; k < end; ++k) {
        const unsigned above = present[k] & own, below = negative[k] & own;
        nan |= above & below;
        present[k] = static_cast<std::uint16_t>(all ? above | below : above ^ below);
        negative[k] = static_cast<std::uint16_t>(below & ~above);
      }
      any_nan |= nan;
    };
    for (std::int64_t remainder = 0; remainder < planes.remainders; ++remainder)
      for (std::int64_t r = 0; r < planes.rows; ++r) {
        const std::int64_t row = lattice.first_row + r * lattice.row_step + remainder;
        for (std::int64_t image = 0; image < block.images; ++image) {
          const std::int64_t then = image + kAheadImages;  // in the order in which rows are read
          const Ahead ahead = Ahead::of<T>(t, block.image + then % block.images, first + c,
                                           row + then / block.images * lattice.row_step, -lattice.padding);
          if (t.stride_c == 1 && width == kLanes && row >= 0 && row < t.h) {
            const std::int64_t begin = std::min(lattice.padding, lattice.read_columns);
            const std::int64_t end = std::min(lattice.padding + t.w, lattice.read_columns);
            const T* const from =
                static_cast<const T*>(t.data) + (block.image + image) * t.stride_n + first + c + row * t.stride_h;
            for (std::uint16_t* const marked : {present, negative}) {
              std::fill(marked, marked + begin, std::uint16_t{0});
              std::fill(marked + end, marked + lattice.read_columns, std::uint16_t{0});
            }
            for (std::int64_t k = begin; k < end; ++k) {
              ahead.call_at(k * ahead.column);  // which call(k) comes to where channels lie side by side
              mark(k, load(from + (k - begin) * t.stride_w));
            }
            settle(begin, end);
          } else {
            pack_row<T>(t, block.image + image, row, lattice.padding, lattice.read_columns, first + c, width, false,
                        values);
            for (std::int64_t k = 0; k < lattice.read_columns; ++k) {
              ahead.call(k);
              mark(k, Vec<A>::load(values + k * width));
            }
            settle(0, lattice.read_columns);
          }
          for (std::int64_t sign = 0; sign < 2; ++sign)
            for (std::int64_t tap = first_made; tap < end_made; ++tap) {
              const std::uint16_t* const from = column_marks + sign * lattice.read_columns + tap;
              std::uint16_t* const to = runs + (sign * planes.taps + tap) * run + image * lattice.columns;
              if (lattice.column_step == 1)
                std::copy_n(from, lattice.columns, to);
              else
                for (std::int64_t w = 0; w < lattice.columns; ++w) to[w] = from[w * lattice.column_step];
            }
        }
        for (std::int64_t sign = 0; sign < 2; ++sign)
          for (std::int64_t tap = first_made; tap < end_made; ++tap) {
            Bits* const to = out + sign * planes.size() + r * planes.row_words;
            for (std::int64_t word = 0; word < planes.row_words; ++word) {
              Bits* const from = words + word * kLanes;
              turn(runs + (sign * planes.taps + tap) * run + word * kWordBits, from);
              for (std::int64_t k = 0; k < width; ++k) to[planes.offset(c + k, tap, remainder) + word] = from[k];
            }
            for (std::int64_t other = 0; move && other < planes.taps; ++other) {
              const std::int64_t shift = std::abs(other - tap);
              for (std::int64_t word = 0; shift && word < planes.row_words; ++word) {
                const Bits* const from = words + word * kLanes;
                const Bits mask = inside[other * planes.row_words + word];
                Bits bits[kLanes];
                if (other > tap)
                  for (int k = 0; k < kLanes; ++k)
                    bits[k] = (from[k] >> shift | from[k + kLanes] << (kWordBits - shift)) & mask;
                else
                  for (int k = 0; k < kLanes; ++k)
                    bits[k] = (from[k] << shift | from[k - kLanes] >> (kWordBits - shift)) & mask;
                for (std::int64_t k = 0; k < width; ++k) to[planes.offset(c + k, other, remainder) + word] = bits[k];
              }
            }
          }
      }
  }
  return any_nan;
}

// ---------------------------------------------------------------------------------------------------- counting

// One operand's planes of present values for some channels, `step` apart; those of negative ones lie `negative` on.
struct Operand {
  const Bits* present;
  std::int64_t step, negative;
};

// Adds to sign_sum[kO][kI] and nonzero[kO][kI], of strides o_step and i_step, where they are not null. kAlike: all
// outputs have the same values present, as they do where no gradient is zero; what is present then is counted once.
template <class Wide, bool kAlike, int kO, int kI>
BNKERN_INLINE void count_tile(const Operand& dy, const Operand& x, std::int64_t words, std::int64_t o_step,
                              std::int64_t i_step, std::int32_t* sign_sum, std::int32_t* nonzero) {
  constexpr int kCounted = kAlike ? 1 : kO;
  Wide present[kCounted][kI], differing[kO][kI];
  for (int i = 0; i < kI; ++i) {
    for (int o = 0; o < kCounted; ++o) present[o][i] = Wide::zero();
    for (int o = 0; o < kO; ++o) differing[o][i] = Wide::zero();
  }
  for (std::int64_t k = 0; k < words; k += Wide::kWide) {
    Wide x_present[kI], x_negative[kI], both[kI];
    for (int i = 0; i < kI; ++i) {
      x_present[i] = Wide::load(x.present + i * x.step + k);
      x_negative[i] = Wide::load(x.present + i * x.step + x.negative + k);
    }
    for (int o = 0; o < kO; ++o) {
      if (o < kCounted) {
        const Wide dy_present = Wide::load(dy.present + o * dy.step + k);
        for (int i = 0; i < kI; ++i) {
          both[i] = dy_present & x_present[i];
          present[o][i].count(both[i]);
        }
      }
      const Wide dy_negative = Wide::load(dy.present + o * dy.step + dy.negative + k);
      for (int i = 0; i < kI; ++i) differing[o][i].count((dy_negative ^ x_negative[i]) & both[i]);
    }
  }
  for (int o = 0; o < kO; ++o)
    for (int i = 0; i < kI; ++i) {
      const std::int64_t at = o * o_step + i * i_step, count = present[o % kCounted][i].total();
      if (nonzero) nonzero[at] += static_cast<std::int32_t>(count);
      if (sign_sum) sign_sum[at] += static_cast<std::int32_t>(count - 2 * differing[o][i].total());
    }
}

template <class Wide, bool kAlike, int kI>
void count_outputs(const Operand& dy, const Operand& x, std::int64_t words, std::int64_t outputs, std::int64_t o_step,
                   std::int64_t i_step, std::int32_t* sign_sum, std::int32_t* nonzero) {
  const auto at = [&](std::int32_t* results, std::int64_t o) { return results ? results + o * o_step : nullptr; };
  std::int64_t o = 0;
  for (; o + 4 <= outputs; o += 4)
    count_tile<Wide, kAlike, 4, kI>({dy.present + o * dy.step, dy.step, dy.negative}, x, words, o_step, i_step,
                                    at(sign_sum, o), at(nonzero, o));
  for (; o < outputs; ++o)
    count_tile<Wide, kAlike, 1, kI>({dy.present + o * dy.step, dy.step, dy.negative}, x, words, o_step, i_step,
                                    at(sign_sum, o), at(nonzero, o));
}

// Adds a block's counts for `outputs` outputs to sign_sum and nonzero [outputs, I, kernel_h, kernel_w].
template <class Wide>
void count_block(const ConvGradSigns& p, const Planes& x_planes, const Planes& dy_planes, const Bits* x, const Bits* dy,
                 std::int32_t* sign_sum, std::int32_t* nonzero) {
  const std::int64_t area = p.kernel_h * p.kernel_w, words = dy_planes.plane();
  const Operand outputs{dy, dy_planes.offset(1, 0, 0), dy_planes.size()};
  const auto at = [](std::int32_t* results, std::int64_t offset) { return results ? results + offset : nullptr; };
  bool alike = true;
  for (std::int64_t o = 1; o < dy_planes.channels; ++o) alike &= std::equal(dy, dy + words, dy + o * outputs.step);
  const auto pairs = alike ? count_outputs<Wide, true, 2> : count_outputs<Wide, false, 2>;
  const auto single = alike ? count_outputs<Wide, true, 1> : count_outputs<Wide, false, 1>;
  for (std::int64_t c = 0; c < p.x.c; c += 2)
    for (std::int64_t k = 0; k < p.kernel_h; ++k)
      for (std::int64_t q = 0; q < p.kernel_w; ++q) {
        const Bits* const first = x + x_planes.offset(c, q, k % p.stride_h) + k / p.stride_h * x_planes.row_words;
        const Operand channels{first, x_planes.offset(1, 0, 0), x_planes.size()};
        const std::int64_t offset = c * area + k * p.kernel_w + q;
        const auto count = c + 2 <= p.x.c ? pairs : single;
        count(outputs, channels, words, dy_planes.channels, p.x.c * area, area, at(sign_sum, offset),
              at(nonzero, offset));
      }
}

using CountBlock = decltype(&count_block<PlainBits>);

CountBlock best_count() {
#if defined(__AVX512F__)
  if (__builtin_cpu_supports("avx512vpopcntdq")) return count_block<WideBits<true>>;
#endif
  return count_block<PlainBits>;
}

// ------------------------------------------------------------------------------------------------------ the drive

template <class T>
void conv_signs_as(const ConvGradSigns& p) {
  using A = Accumulator<T>;
  static const CountBlock count = best_count();
  const std::int64_t area = p.kernel_h * p.kernel_w, size = p.dy.c * p.x.c * area;
  const Pieces chunks = chunks_of(p, kLeastPositions, size * static_cast<std::int64_t>(sizeof(std::int32_t)));
  const std::int64_t outputs = outputs_per_task(p, chunks.count()), parts = divide_up(p.dy.c, outputs);
  const std::int64_t tasks = chunks.count() * parts;
  const int threads = static_cast<int>(std::min<std::int64_t>(tasks, p.threads));

  // A position's bits in all planes; what rows are filled up with does not count.
  const std::int64_t position_bits = 2 * (p.x.c * p.kernel_w * std::min(p.stride_h, p.kernel_h) + p.dy.c);
  const std::int64_t positions = std::min(kBlockPositions, 8 * kBlockBytes / position_bits);
  const auto x_planes = [&](const Rectangle& block) {
    return Planes{p.x.c, p.kernel_w, std::min(p.stride_h, p.kernel_h), block.rows + (p.kernel_h - 1) / p.stride_h,
                  divide_up(block.images * p.dy.w, kWordBits)};
  };
  const auto dy_planes = [&](const Rectangle& block, std::int64_t own_outputs) {
    return Planes{own_outputs, 1, 1, block.rows, divide_up(block.images * p.dy.w, kWordBits)};
  };
  std::int64_t x_size = 0, dy_size = 0, marks_size = 0, turned = 0;
  for (std::int64_t k = 0; k < chunks.count(); ++k) {
    const Pieces blocks = blocks_of(p, chunks[k], positions);
    const Rectangle block{0, blocks.images, 0, blocks.rows};
    x_size = std::max(x_size, 2 * x_planes(block).size() + kWords);  // the last plane is read in whole vectors
    dy_size = std::max(dy_size, 2 * dy_planes(block, outputs).size());
    turned = std::max(turned, turned_size(x_planes(block).row_words, p.kernel_w));
    marks_size = std::max(marks_size, 2 * x_columns(p) + 2 * p.kernel_w * x_planes(block).row_words * kWordBits);
  }
  const std::int64_t values_size = std::max(x_columns(p), p.dy.w) * kLanes + kLanes;
  const std::int64_t scratch =
      round_up(static_cast<std::int64_t>((x_size + dy_size + turned) * sizeof(Bits) +
                                         marks_size * sizeof(std::uint16_t) + values_size * sizeof(A)),
               64) +
      320;
  const std::int64_t partials = chunks.count() * size;
  const PoolSpace pool(2 * (partials * static_cast<std::int64_t>(sizeof(std::int32_t)) + 64) + threads * scratch);
  char* space = pool.data();
  std::int32_t* const sign_sum = p.sign_sum ? take<std::int32_t>(space, partials) : nullptr;
  std::int32_t* const nonzero = p.nonzero ? take<std::int32_t>(space, partials) : nullptr;
  char* const scratches = space;

  // Partial results joined; all threads of the region share it.
  const auto join = [&](const std::int32_t* partial, std::int32_t* result) {
#pragma omp for schedule(static) nowait
    for (std::int64_t k = 0; k < size; ++k) {
      std::int32_t total = 0;
      for (std::int64_t chunk = 0; chunk < chunks.count(); ++chunk) total += partial[chunk * size + k];
      result[k] = total;
    }
  };

#pragma omp parallel num_threads(threads)
  {
    char* own = scratches + omp_get_thread_num() * scratch;
    Bits* const x = take<Bits>(own, x_size);
    Bits* const dy = take<Bits>(own, dy_size);
    Bits* const own_turned = take<Bits>(own, turned);
    A* const values = take<A>(own, values_size);
    std::uint16_t* const marks = take<std::uint16_t>(own, marks_size);
#pragma omp for schedule(dynamic)
    for (std::int64_t task = 0; task < tasks; ++task) {
      const std::int64_t chunk = task / parts, output = task % parts * outputs;
      const std::int64_t own_outputs = std::min(outputs, p.dy.c - output), first = output * p.x.c * area;
      std::int32_t* const own_sign_sum = sign_sum ? sign_sum + chunk * size + first : nullptr;
      std::int32_t* const own_nonzero = nonzero ? nonzero + chunk * size + first : nullptr;
      for (std::int32_t* const results : {own_sign_sum, own_nonzero})
        if (results) std::fill_n(results, own_outputs * p.x.c * area, 0);
      const Pieces blocks = blocks_of(p, chunks[chunk], positions);
      for (std::int64_t b = 0; b < blocks.count(); ++b) {
        const Rectangle block = blocks[b];
        const Planes of_x = x_planes(block), of_dy = dy_planes(block, own_outputs);
        const Lattice x_lattice{
            block.row * p.stride_h - p.padding_h, p.stride_h, p.stride_w, p.padding_w, p.dy.w, x_columns(p)};
        const Lattice dy_lattice{block.row, 1, 1, 0, p.dy.w, p.dy.w};
        const auto count_once = [&](bool all, std::int32_t* signs, std::int32_t* nonzeros) {
          bool any_nan = make_planes<T>(p.x, block, x_lattice, of_x, 0, all, x, values, marks, own_turned);
          any_nan |= make_planes<T>(p.dy, block, dy_lattice, of_dy, output, all, dy, values, marks, own_turned);
          count(p, of_x, of_dy, x, dy, signs, any_nan && !all ? nullptr : nonzeros);
          return any_nan;
        };
        if (count_once(false, own_sign_sum, own_nonzero) && nonzero) count_once(true, nullptr, own_nonzero);
      }
    }
    if (sign_sum) join(sign_sum, p.sign_sum);
    if (nonzero) join(nonzero, p.nonzero);
  }
}

}  // namespace

void conv_signs(const ConvGradSigns& p) {
  with_dtype(p.dtype, [&](auto* t) { conv_signs_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
