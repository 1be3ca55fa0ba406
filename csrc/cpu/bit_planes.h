// Bit planes of a tensor: one of the values of a channel that are present (not zero), and one of those that are
// negative, with 64 positions in a word.
//
// Positions are in the order (row, image, column), and each row of a block is filled up to whole words with zeros.
// Kernel row p is then an offset of p rows in a plane of x, so it needs no shift of bits. With a stride along rows, the
// rows of x form stride_h planes, one for each remainder of the row.
#pragma once

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {

using Bits = std::uint64_t;
constexpr std::int64_t kWordBits = 64;
constexpr std::int64_t kWords = 8;           // the length of a plane is a multiple of this
constexpr std::int64_t kPrefetchImages = 2;  // the prefetch distance, in rows of one image

// Whether the machine has vpermi2b and vgf2p8affineqb. Not every machine with AVX-512 has them, so they are written in
// assembly, and the compiler cannot use them elsewhere.
inline bool has_native_transpose() {
#if defined(__AVX512F__)
  static const bool native =
      with_extensions() && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
  return native;
#else
  return false;
#endif
}

#if defined(__AVX512F__)
// transpose_bits() with these instructions. The bytes of eight positions, the last position first, are an 8 x 8 matrix
// of bits. One multiplication transposes it, which gives one byte of each channel for every eight positions.
BNKERN_INLINE void transpose_bits_native(const std::uint16_t* positions, Bits* words) {
  const __m512i first = _mm512_loadu_si512(positions), second = _mm512_loadu_si512(positions + 32);
  // Byte t of group g is at 2 (8 g + 7 - t) in both registers. After the transposition byte g of channel t is at
  // 8 g + t.
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

// Transposes the bits of 64 positions, one bit for each of 16 channels, into one word for each channel.
BNKERN_INLINE void transpose_bits(const std::uint16_t* positions, Bits* words) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_loadu_si512(positions), second = _mm512_loadu_si512(positions + 32);
  for (int half = 0; half < 2; ++half) {
    const auto bytes = [&](__m512i v) { return _mm512_cvtepi16_epi8(half ? _mm512_srli_epi16(v, 8) : v); };
    __m512i v = _mm512_inserti64x4(_mm512_castsi256_si512(bytes(first)), bytes(second), 1);
    for (int bit = 7; bit >= 0; --bit, v = _mm512_add_epi8(v, v)) words[8 * half + bit] = _mm512_movepi8_mask(v);
  }
#elif defined(__AVX2__)
  for (int half = 0; half < 2; ++half) {
    // The bytes of 32 positions. Packing works within each half of a register, so the quarters are reordered after it.
    const auto bytes = [&](const std::uint16_t* from) {
      const auto load_bytes = [&](int k) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + k));
        return half ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
      };
      return _mm256_permute4x64_epi64(_mm256_packus_epi16(load_bytes(0), load_bytes(16)), 0xd8);
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
      // Transposes an 8 x 8 matrix of bits, one byte per row, by exchanging blocks of 1, 2 and 4.
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

BNKERN_INLINE void transpose_bits([[maybe_unused]] bool native, const std::uint16_t* positions, Bits* words) {
#if defined(__AVX512F__)
  if (native) return transpose_bits_native(positions, words);
#endif
  transpose_bits(positions, words);
}

// The planes of one tensor over a block, [channel][tap][remainder][row][word]. The planes of present values come first,
// then those of negative values. A tap is a column of the kernel. A remainder is that of the row by the stride.
struct Planes {
  std::int64_t channels, taps, remainders, rows, row_words;
  std::int64_t plane() const { return round_up(rows * row_words, kWords); }
  std::int64_t size() const { return channels * taps * remainders * plane(); }
  std::int64_t offset(std::int64_t channel, std::int64_t tap, std::int64_t remainder) const {
    return ((channel * taps + tap) * remainders + remainder) * plane();
  }
};

// The rows and columns of the tensor that belong to the planes. Row r of a remainder is row (first_row + r * row_step +
// remainder), and column w of a tap is column (w * column_step + tap - padding).
struct Lattice {
  std::int64_t first_row, row_step, column_step, padding, columns, read_columns;
};

// Words of scratch for one row of 16 channels: see `transposed` below.
constexpr std::int64_t transposed_size(std::int64_t row_words, std::int64_t taps) {
  return (row_words + 2) * kLanes + row_words * taps;
}

// Whether a block has a NaN, and whether it has a negative value.
struct Contents {
  bool nan, negative;
};

// Makes the planes of channels [first, first + planes.channels) of t over the images of a block. `with_nan`: NaN counts
// as present. The planes of negative values are written only if there is a negative value. `values` [read_columns][16],
// `marks`, and `transposed` of transposed_size() words are scratch.
//
// If a convolution keeps the width, the tap without an offset reads exactly the image's columns, which are marked in
// place. The plane of every other tap is the same plane shifted, with zeros in place of the columns of the next image.
// To shift 64 columns at once is cheaper than to transpose them again.
template <class T>
Contents make_planes(const Image& t, const Rectangle& block, const Lattice& lattice, const Planes& planes,
                     std::int64_t first, bool with_nan, Bits* out, Accumulator<T>* values, std::uint16_t* marks,
                     Bits* transposed) {
  using A = Accumulator<T>;
  const std::int64_t run = planes.row_words * kWordBits, filled = block.images * lattice.columns;
  std::uint16_t *const column_marks = marks, *const runs = marks + 2 * lattice.read_columns;
  const bool shift_taps = lattice.column_step == 1 && t.w == lattice.columns && planes.taps < kWordBits;
  const bool native = has_native_transpose();
  const std::int64_t first_tap = shift_taps ? lattice.padding : 0;
  const std::int64_t end_tap = shift_taps ? first_tap + 1 : planes.taps;
  const std::int64_t padding = shift_taps ? 0 : lattice.padding, read_columns = shift_taps ? t.w : lattice.read_columns;
  // The words of a row for 16 channels, with zeros before and after them. Behind them, for each tap, the columns that
  // are inside of their image.
  Bits *const words = transposed + kLanes, *const inside = words + (planes.row_words + 1) * kLanes;
  std::fill(transposed, words, Bits{0});
  std::fill(inside - kLanes, inside + planes.taps * planes.row_words, Bits{0});
  for (std::int64_t tap = 0; shift_taps && tap < planes.taps; ++tap)
    for (std::int64_t k = 0; k < filled; ++k) {
      const std::int64_t column = k % lattice.columns + tap - lattice.padding;
      const Bits is_inside = column >= 0 && column < lattice.columns;
      inside[tap * planes.row_words + k / kWordBits] |= is_inside << k % kWordBits;
    }
  unsigned any_nan = 0, row_negative = 0;
  bool any_negative = false;
  for (std::int64_t tap = 0; tap < 2 * planes.taps; ++tap)
    std::fill(runs + tap * run + filled, runs + (tap + 1) * run, std::uint16_t{0});
  // Clears the words of each plane behind its rows.
  for (std::int64_t k = planes.rows * planes.row_words; k < planes.plane(); ++k)
    for (std::int64_t plane = 0; plane < planes.channels * planes.taps * planes.remainders; ++plane)
      out[plane * planes.plane() + k] = 0;

  std::uint16_t *present = column_marks, *negative = column_marks + read_columns;
  for (std::int64_t c = 0; c < planes.channels; c += kLanes) {
    const std::int64_t width = std::min<std::int64_t>(kLanes, planes.channels - c);
    const unsigned own = (1u << width) - 1;
    // First mark the values above zero and those below zero; NaN is marked as both. When a row is complete, settle()
    // turns these marks into present and negative, many at a time.
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
        present[k] = static_cast<std::uint16_t>(with_nan ? above | below : above ^ below);
        negative[k] = static_cast<std::uint16_t>(below & ~above);
      }
      any_nan |= nan, row_negative |= is_negative;
    };
    for (std::int64_t remainder = 0; remainder < planes.remainders; ++remainder)
      for (std::int64_t r = 0; r < planes.rows; ++r) {
        row_negative = 0;
        const std::int64_t row = lattice.first_row + r * lattice.row_step + remainder;
        for (std::int64_t image = 0; image < block.images; ++image) {
          const std::int64_t next = image + kPrefetchImages;  // in the order in which rows are read
          const Prefetch ahead = Prefetch::of<T>(t, block.image + next % block.images, first + c,
                                                 row + next / block.images * lattice.row_step, -padding);
          if (shift_taps) {
            present = runs + first_tap * run + image * lattice.columns;
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
              ahead.prefetch_at(k * ahead.line);  // the same as prefetch(k), because channels have unit stride
              mark(k, load(from + (k - begin) * t.stride_w));
            }
            if (!shift_taps) settle(present, negative, begin, end);
          } else {
            pack_row<T>(t, block.image + image, row, padding, read_columns, first + c, width, false, values);
            for (std::int64_t k = 0; k < read_columns; ++k) {
              ahead.prefetch(k);
              mark(k, Vec<A>::load(values + k * width));
            }
            if (!shift_taps) settle(present, negative, 0, read_columns);
          }
          for (std::int64_t sign = 0; !shift_taps && sign < 2; ++sign)
            for (std::int64_t tap = first_tap; tap < end_tap; ++tap) {
              const std::uint16_t* const from = column_marks + sign * read_columns + tap;
              std::uint16_t* const to = runs + (sign * planes.taps + tap) * run + image * lattice.columns;
              if (lattice.column_step == 1)
                std::copy_n(from, lattice.columns, to);
              else
                for (std::int64_t w = 0; w < lattice.columns; ++w) to[w] = from[w * lattice.column_step];
            }
        }
        if (shift_taps) settle(runs + first_tap * run, runs + (planes.taps + first_tap) * run, 0, filled);
        if (row_negative && !any_negative) {  // the first row with a negative value: clears all rows
          std::fill_n(out + planes.size(), planes.size(), Bits{0});
          any_negative = true;
        }
        for (std::int64_t sign = 0; sign < (row_negative ? 2 : 1); ++sign)
          for (std::int64_t tap = first_tap; tap < end_tap; ++tap) {
            Bits* const to = out + sign * planes.size() + r * planes.row_words;
            for (std::int64_t word = 0; word < planes.row_words; ++word) {
              Bits* const from = words + word * kLanes;
              transpose_bits(native, runs + (sign * planes.taps + tap) * run + word * kWordBits, from);
              for (std::int64_t k = 0; k < width; ++k) to[planes.offset(c + k, tap, remainder) + word] = from[k];
            }
            for (std::int64_t other = 0; shift_taps && other < planes.taps; ++other) {
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
