// Bit planes of a tensor: which values of a channel are present (not zero), and which are negative, 64 positions a
// word.
//
// Positions are in the order (row, image, column), each row of a block filled up to whole words with zeros: kernel
// row p then is an offset of p rows in a plane of x, and no bit is ever shifted. With a stride along rows x's rows
// form stride_h planes, one for each remainder of the row.
#pragma once

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {

using Bits = std::uint64_t;
constexpr std::int64_t kWordBits = 64;
constexpr std::int64_t kWords = 8;        // what a plane's length is a multiple of
constexpr std::int64_t kAheadImages = 2;  // how many images' rows ahead memory is called for

// Whether there are vpermi2b and vgf2p8affineqb, which the compiler is not told of either.
inline bool turns_natively() {
#if defined(__AVX512F__)
  static const bool native =
      with_extensions() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  return native;
#else
  return false;
#endif
}

#if defined(__AVX512F__)
// turn() by them: eight positions' bytes, last first, are an 8 x 8 matrix of bits, transposed by one multiplication;
// that leaves a byte of each channel for every eight positions.
BNKERN_INLINE void turn_natively(const std::uint16_t* positions, Bits* words) {
  const __m512i first = _mm512_loadu_si512(positions), second = _mm512_loadu_si512(positions + 32);
  // Byte t of group g is at 2 (8 g + 7 - t) of both registers, byte g of channel t then at 8 g + t.
  const __m512i groups =
      _mm512_mullo_epi64(_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7), _mm512_set1_epi64(0x0101010101010101));
  __m512i low = _mm512_add_epi8(_mm512_slli_epi64(groups, 4), _mm512_set1_epi64(0x00020406080a0c0e));
  __m512i high = _mm512_add_epi8(low, _mm512_set1_epi8(1));
  const __m512i bits = _mm512_set1_epi64(static_cast<std::int64_t>(0x8040201008040201));
  const __m512i gather = _mm512_add_epi8(_mm512_set1_epi64(0x3830282018100800), groups);
  asm("vpermi2b %2, %1, %0" : "+v"(low) : "v"(first), "v"(second));
  asm("vpermi2b %2, %1, %0" : "+v"(high) : "v"(first), "v"(second));
  asm("vgf2p8affineqb $0, %1, %2, %0" : "=v"(low) : "0"(low), "v"(bits));
  asm("vgf2p8affineqb $0, %1, %2, %0" : "=v"(high) : "0"(high), "v"(bits));
  asm("vpermb %1, %2, %0" : "=v"(low) : "0"(low), "v"(gather));
  asm("vpermb %1, %2, %0" : "=v"(high) : "0"(high), "v"(gather));
  _mm512_storeu_si512(words, low);
  _mm512_storeu_si512(words + 8, high);
}
#endif

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

BNKERN_INLINE void turn([[maybe_unused]] bool natively, const std::uint16_t* positions, Bits* words) {
#if defined(__AVX512F__)
  if (natively) return turn_natively(positions, words);
#endif
  turn(positions, words);
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

struct Found {
  bool nan, negative;
};

// Channels [first, first + planes.channels) of t over the images of a block. `all`: NaN is present too. Planes of
// negative values are whole only where there is one. `values` [read_columns][16], `marks` and `turned`, of
// turned_size(), are scratch.
//
// Where a convolution keeps the width, the tap that starts where the image does has just the image's columns, so that
// they are marked in place, and another tap is the same plane moved along, with zeros where it would meet the next
// image. Moving 64 columns at once is cheaper than turning them again.
template <class T>
Found make_planes(const Image& t, const Rectangle& block, const Lattice& lattice, const Planes& planes,
                  std::int64_t first, bool all, Bits* out, Accumulator<T>* values, std::uint16_t* marks, Bits* turned) {
  using A = Accumulator<T>;
  const std::int64_t run = planes.row_words * kWordBits, filled = block.images * lattice.columns;
  std::uint16_t *const column_marks = marks, *const runs = marks + 2 * lattice.read_columns;
  const bool move = lattice.column_step == 1 && t.w == lattice.columns && planes.taps < kWordBits;
  const bool natively = turns_natively();
  const std::int64_t first_made = move ? lattice.padding : 0, end_made = move ? first_made + 1 : planes.taps;
  const std::int64_t padding = move ? 0 : lattice.padding, read_columns = move ? t.w : lattice.read_columns;
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
  unsigned any_nan = 0, row_negative = 0;
  bool any_negative = false;
  for (std::int64_t tap = 0; tap < 2 * planes.taps; ++tap)
    std::fill(runs + tap * run + filled, runs + (tap + 1) * run, std::uint16_t{0});
  // What a plane has beyond its rows.
  for (std::int64_t k = planes.rows * planes.row_words; k < planes.plane(); ++k)
    for (std::int64_t plane = 0; plane < planes.channels * planes.taps * planes.remainders; ++plane)
      out[plane * planes.plane() + k] = 0;

  std::uint16_t *present = column_marks, *negative = column_marks + read_columns;
  for (std::int64_t c = 0; c < planes.channels; c += kLanes) {
    const std::int64_t width = std::min<std::int64_t>(kLanes, planes.channels - c);
    const unsigned own = (1u << width) - 1;
    // First what is above zero and what is below, NaN being both; once a row is read, what they say, many at a time.
    const auto mark = [&](std::int64_t k, Vec<A> v) {
      present[k] = v.above_zero().bits();
      negative[k] = v.below_zero().bits();
    };
    const auto settle = [&](std::uint16_t* present, std::uint16_t* negative, std::int64_t begin, std::int64_t end) {
      unsigned nan = 0, is_negative = 0;
      for (std::int64_t k = begin; k < end; ++k) {
        const unsigned above = present[k] & own, below = negative[k] & own;
        nan |= above & below;
        is_negative |= below & ~above;
        present[k] = static_cast<std::uint16_t>(all ? above | below : above ^ below);
        negative[k] = static_cast<std::uint16_t>(below & ~above);
      }
      any_nan |= nan, row_negative |= is_negative;
    };
    for (std::int64_t remainder = 0; remainder < planes.remainders; ++remainder)
      for (std::int64_t r = 0; r < planes.rows; ++r) {
        row_negative = 0;
        const std::int64_t row = lattice.first_row + r * lattice.row_step + remainder;
        for (std::int64_t image = 0; image < block.images; ++image) {
          const std::int64_t then = image + kAheadImages;  // in the order in which rows are read
          const Ahead ahead = Ahead::of<T>(t, block.image + then % block.images, first + c,
                                           row + then / block.images * lattice.row_step, -padding);
          if (move) {
            present = runs + first_made * run + image * lattice.columns;
            negative = present + planes.taps * run;
          }
          if (t.stride_c == 1 && width == kLanes && row >= 0 && row < t.h) {
            const std::int64_t begin = std::min(padding, read_columns);
            const std::int64_t end = std::min(padding + t.w, read_columns);
            const T* const from =
                static_cast<const T*>(t.data) + (block.image + image) * t.stride_n + first + c + row * t.stride_h;
            for (std::uint16_t* const marked : {present, negative}) {
              std::fill(marked, marked + begin, std::uint16_t{0});
              std::fill(marked + end, marked + read_columns, std::uint16_t{0});
            }
            for (std::int64_t k = begin; k < end; ++k) {
              ahead.call_at(k * ahead.column);  // which call(k) comes to where channels lie side by side
              mark(k, load(from + (k - begin) * t.stride_w));
            }
            if (!move) settle(present, negative, begin, end);
          } else {
            pack_row<T>(t, block.image + image, row, padding, read_columns, first + c, width, false, values);
            for (std::int64_t k = 0; k < read_columns; ++k) {
              ahead.call(k);
              mark(k, Vec<A>::load(values + k * width));
            }
            if (!move) settle(present, negative, 0, read_columns);
          }
          for (std::int64_t sign = 0; !move && sign < 2; ++sign)
            for (std::int64_t tap = first_made; tap < end_made; ++tap) {
              const std::uint16_t* const from = column_marks + sign * read_columns + tap;
              std::uint16_t* const to = runs + (sign * planes.taps + tap) * run + image * lattice.columns;
              if (lattice.column_step == 1)
                std::copy_n(from, lattice.columns, to);
              else
                for (std::int64_t w = 0; w < lattice.columns; ++w) to[w] = from[w * lattice.column_step];
            }
        }
        if (move) settle(runs + first_made * run, runs + (planes.taps + first_made) * run, 0, filled);
        if (row_negative && !any_negative) {  // the first: rows before it have none, and so have others after it
          std::fill_n(out + planes.size(), planes.size(), Bits{0});
          any_negative = true;
        }
        for (std::int64_t sign = 0; sign < (row_negative ? 2 : 1); ++sign)
          for (std::int64_t tap = first_made; tap < end_made; ++tap) {
            Bits* const to = out + sign * planes.size() + r * planes.row_words;
            for (std::int64_t word = 0; word < planes.row_words; ++word) {
              Bits* const from = words + word * kLanes;
              turn(natively, runs + (sign * planes.taps + tap) * run + word * kWordBits, from);
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
  return {any_nan != 0, any_negative};
}

}  // namespace bnkern::BNKERN_ISA
