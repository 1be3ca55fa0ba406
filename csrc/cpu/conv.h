// Shared by the files of conv_grad_signs: the geometry of a convolution, the division of its positions, and the packing
// of x and dy. conv_sums.cpp and conv3x3_gradient.cpp compute the sums, conv_signs.cpp computes signs and counts, and
// conv_grad_signs.cpp runs them.
//
// A chunk is a rectangle of images x rows of dy. Each chunk has a partial result, and these are joined in order. A
// block is a rectangle within a chunk. Its packed values fit into the caches. Both depend on shapes alone.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>

#include "../params.h"
#include "pool.h"
#include "storage.h"

namespace bnkern::BNKERN_ISA {

constexpr std::int64_t kMostChunks = 32;
constexpr std::int64_t kPartialBytes = 32 << 20;  // limit for the partials of one result if there are several chunks

// A rectangle of images and rows.
struct Rectangle {
  std::int64_t image, images, row, rows;
};

// The division of a rectangle into pieces of at most `images` x `rows`.
struct Pieces {
  Rectangle rectangle;
  std::int64_t images, rows;
  std::int64_t row_pieces() const { return divide_up(rectangle.rows, rows); }
  std::int64_t count() const { return divide_up(rectangle.images, images) * row_pieces(); }
  Rectangle operator[](std::int64_t k) const {
    const std::int64_t i = k / row_pieces() * images, r = k % row_pieces() * rows;
    return {rectangle.image + i, std::min(images, rectangle.images - i), rectangle.row + r,
            std::min(rows, rectangle.rows - r)};
  }
};

// Divides a rectangle into about `count` pieces. They are whole images if there are at least `count` images.
inline Pieces split(const Rectangle& rectangle, std::int64_t count) {
  const std::int64_t images = divide_up(rectangle.images, std::clamp<std::int64_t>(count, 1, rectangle.images));
  const std::int64_t row_pieces = count / divide_up(rectangle.images, images);
  return {rectangle, images, divide_up(rectangle.rows, std::clamp<std::int64_t>(row_pieces, 1, rectangle.rows))};
}

// The chunks of a convolution. A chunk has at least `least` positions, if there are as many. Its partial result has
// `bytes` bytes, and kPartialBytes limits those of all chunks.
inline Pieces chunks_of(const ConvGradSigns& p, std::int64_t least, std::int64_t bytes) {
  const std::int64_t positions = p.dy.n * p.dy.h * p.dy.w;
  return split({0, p.dy.n, 0, p.dy.h}, std::min({kMostChunks, positions / least, kPartialBytes / bytes}));
}

// The blocks of a chunk. A block has at most `positions` positions, but at least one row.
inline Pieces blocks_of(const ConvGradSigns& p, const Rectangle& chunk, std::int64_t positions) {
  const std::int64_t rows = std::max<std::int64_t>(positions / p.dy.w, 1);
  if (rows < chunk.rows) return {chunk, 1, divide_up(chunk.rows, divide_up(chunk.rows, rows))};
  return {chunk, std::min(rows / chunk.rows, chunk.images), chunk.rows};
}

// The number of rows of x that belong to `rows` rows of dy, and of columns that belong to all columns of dy. Both
// include the padding.
inline std::int64_t x_rows(const ConvGradSigns& p, std::int64_t rows) { return (rows - 1) * p.stride_h + p.kernel_h; }
inline std::int64_t x_columns(const ConvGradSigns& p) { return (p.dy.w - 1) * p.stride_w + p.kernel_w; }

// The number of outputs of a task: all outputs if there are at least as many chunks as threads. Results do not depend
// on it.
inline std::int64_t outputs_per_task(const ConvGradSigns& p, std::int64_t chunks) {
  const std::int64_t parts = divide_up(2 * p.threads, chunks);
  return chunks >= p.threads ? p.dy.c : round_up(divide_up(p.dy.c, parts), kLanes);
}

// Owns a block of memory from the pool.
class PoolSpace {
 public:
  explicit PoolSpace(std::int64_t bytes) : block_(pool_take(static_cast<std::size_t>(bytes))) {}
  ~PoolSpace() { pool_give(block_); }
  PoolSpace(const PoolSpace&) = delete;
  char* data() const { return static_cast<char*>(block_.data); }

 private:
  PoolBlock block_;
};

// Returns room for `count` values at `space`, and moves `space` behind it.
template <class A>
BNKERN_INLINE A* take(char*& space, std::int64_t count) {
  A* const piece = reinterpret_cast<A*>(space);
  space += round_up(count * static_cast<std::int64_t>(sizeof(A)), 64);
  return piece;
}

// ------------------------------------------------------------------------------------------------- packing

BNKERN_INLINE float magnitude(float a) { return __builtin_fabsf(a); }
BNKERN_INLINE double magnitude(double a) { return __builtin_fabs(a); }
template <class A>
BNKERN_INLINE ArrayVec<A> magnitude(ArrayVec<A> a) {
  return a.magnitude();
}
#if defined(__AVX512F__)
BNKERN_INLINE FloatVec magnitude(FloatVec a) { return {_mm512_abs_ps(a.v)}; }
#elif defined(__AVX2__)
BNKERN_INLINE FloatVec magnitude(FloatVec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
#endif

template <class T>
BNKERN_INLINE void convert(const T* from, std::int64_t count, bool absolute, Accumulator<T>* to) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto v = load(from + i);
    (absolute ? magnitude(v) : v).store(to + i);
  }
  for (; i < count; ++i) to[i] = absolute ? magnitude(widen(from[i])) : widen(from[i]);
}

// Transposes a block of at most 16 channels x 16 columns, from unit stride along columns to unit stride along channels.
template <class T>
BNKERN_INLINE void transpose(const T* from, std::int64_t step, int channels, int columns, bool absolute,
                             Accumulator<T>* to, std::int64_t pitch) {
#if defined(__AVX512F__)
  if constexpr (!std::is_same_v<T, double>) {
    const auto first = [](int n) { return static_cast<__mmask16>((1 << n) - 1); };
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) {
      const __mmask16 mask = i < channels ? first(columns) : 0;
      if constexpr (std::is_same_v<T, float>)
        a[i] = _mm512_maskz_loadu_ps(mask, from + i * step);
      else
        a[i] = widen(_mm256_maskz_loadu_epi16(mask, from + i * step), static_cast<T*>(nullptr)).v;
    }
    if (absolute)
      for (int i = 0; i < 16; ++i) a[i] = _mm512_abs_ps(a[i]);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // Collects the columns that are i modulo 4 from rows 4k to 4k + 3.
    for (int k = 0; k < 16; k += 4)
      for (int i = 0; i < 2; ++i) {
        const __m512d lo = _mm512_castps_pd(b[k + i]), hi = _mm512_castps_pd(b[k + i + 2]);
        a[k + 2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
        a[k + 2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
      }
    // Moves the quarters of the registers to their positions.
    for (int i = 0; i < 4; ++i) {
      const auto pick = [](__m512 v, __m512 w, auto which) {
        return _mm512_shuffle_f32x4(v, w, decltype(which)::value);
      };
      using Even = std::integral_constant<int, 0x88>;
      using Odd = std::integral_constant<int, 0xdd>;
      const __m512 even01 = pick(a[i], a[i + 4], Even()), odd01 = pick(a[i], a[i + 4], Odd());
      const __m512 even23 = pick(a[i + 8], a[i + 12], Even()), odd23 = pick(a[i + 8], a[i + 12], Odd());
      b[i] = pick(even01, even23, Even());
      b[i + 4] = pick(odd01, odd23, Even());
      b[i + 8] = pick(even01, even23, Odd());
      b[i + 12] = pick(odd01, odd23, Odd());
    }
    for (int i = 0; i < 16; ++i)
      if (i < columns) _mm512_mask_storeu_ps(to + i * pitch, first(channels), b[i]);
    return;
  }
#endif
  for (int c = 0; c < channels; ++c)
    for (int i = 0; i < columns; ++i) {
      const Accumulator<T> value = widen(from[c * step + i]);
      to[i * pitch + c] = absolute ? magnitude(value) : value;
    }
}

// Packs `columns` columns of one row of an image, for channels [channel, channel + width), into out [columns][width].
// Column k is column k - padding of the image. Outside the image it is zero.
template <class T>
BNKERN_INLINE void pack_row(const Image& t, std::int64_t image, std::int64_t row, std::int64_t padding,
                            std::int64_t columns, std::int64_t channel, std::int64_t width, bool absolute,
                            Accumulator<T>* out) {
  using A = Accumulator<T>;
  const std::int64_t first = std::min(padding, columns), last = std::min(padding + t.w, columns);
  if (row < 0 || row >= t.h || last <= first) {
    std::fill_n(out, columns * width, A(0));
    return;
  }
  std::fill_n(out, first * width, A(0));
  std::fill_n(out + last * width, (columns - last) * width, A(0));
  const T* const from = static_cast<const T*>(t.data) + image * t.stride_n + channel * t.stride_c + row * t.stride_h;
  A* const to = out + first * width;
  const std::int64_t length = last - first;
  if (width == t.c && (t.stride_c == 1 || width == 1) && t.stride_w == width)
    return convert(from, length * width, absolute, to);
  if (t.stride_c == 1) {
    for (std::int64_t i = 0; i < length; ++i) convert(from + i * t.stride_w, width, absolute, to + i * width);
    return;
  }
  const auto block = [](std::int64_t left) { return static_cast<int>(std::min<std::int64_t>(left, kLanes)); };
  for (std::int64_t c = 0; c < width; c += kLanes)
    for (std::int64_t i = 0; i < length; i += kLanes)
      transpose(from + c * t.stride_c + i, t.stride_c, block(width - c), block(length - i), absolute,
                to + i * width + c, width);
}

// Prefetches a row of an image for 16 channels, one cache line at a time. A line has 16 floats: 16 channels of one
// column if channels have unit stride, otherwise 16 columns of one channel.
struct Prefetch {
  const char* row;
  std::int64_t line, group;  // bytes from one line to the next, and from one group of 16 lines to the next
  template <class T>
  static BNKERN_INLINE Prefetch of(const Image& t, std::int64_t image, std::int64_t channel, std::int64_t row,
                                   std::int64_t column) {
    constexpr std::int64_t item = sizeof(T);
    const std::int64_t offset = image * t.stride_n + channel * t.stride_c + row * t.stride_h +
                                column * t.stride_w;  // may be outside of the tensor
    return {reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(t.data) + item * offset),
            item * (t.stride_c == 1 ? t.stride_w : t.stride_c), item * 16 * t.stride_w};
  }
  BNKERN_INLINE void prefetch(std::int64_t k) const { prefetch_at((k & 15) * line + (k >> 4) * group); }
  BNKERN_INLINE void prefetch_at(std::int64_t offset) const {
    __builtin_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(row) + offset), 0, 2);
  }
};

// ------------------------------------------------------------------------------------------------------ parts

// Computes one or more of the results. A task processes a piece of x and dy. Tasks are numbered in memory order, may
// run in any order, and need scratch memory of their own. join() combines the partial results of all tasks. All threads
// of a parallel region call it and divide its loop among them.
class Summation {
 public:
  virtual ~Summation() = default;
  virtual std::int64_t tasks() const = 0;
  virtual std::int64_t scratch_bytes() const = 0;
  virtual void run(std::int64_t task, char* scratch) = 0;
  virtual void join() = 0;
};

// Each computes those of its results that are not null. The last one computes the sum, or the absolute sum if
// `absolute`.
std::unique_ptr<Summation> conv_sums(const ConvGradSigns& p);
std::unique_ptr<Summation> conv_signs(const ConvGradSigns& p);
std::unique_ptr<Summation> conv3x3_gradient(const ConvGradSigns& p, bool absolute);

}  // namespace bnkern::BNKERN_ISA
