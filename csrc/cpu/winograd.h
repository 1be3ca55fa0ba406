// Winograd's F(2 x 2, 3 x 3): 2 x 2 outputs of a 3 x 3 convolution of stride 1, computed from 4 x 4 inputs with 16
// products. The definition needs 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). Let g
// be the weight, d the inputs and y the outputs of a tile. M' is the transpose of M. Without the sums over channels:
//
//   y = A' [(G g G') . (B' d B)] A,   and so for gradients   dg = G' [(B' d B) . (A dy A')] G,
//
//   B' = 1  0 -1  0    G = 1    0    0      A' = 1  1  1  0
//        0  1  1  0        1/2  1/2  1/2         0  1 -1 -1
//        0 -1  1  0        1/2 -1/2  1/2
//        0  1  0 -1        0    0    1
//
// Each of the 16 elements of a transformed tile has a matrix product of its own, of tiles by channels. A band is a
// number of rows of tiles. Its factors are stored as [element][tile][channel]. The order of every sum depends on shapes
// alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "conv.h"
#include "cpu.h"
#include "tiles.h"

namespace bnkern::BNKERN_ISA {

constexpr int kElements = 16;            // of a transformed tile
constexpr std::int64_t kBandTiles = 16;  // the least number of tiles in a band; buffers have room for a multiple of it

inline void check_channels(std::int64_t inputs, std::int64_t outputs) {
  if (inputs % kLanes || outputs % kLanes) throw std::invalid_argument("conv3x3: channels must be multiples of 16");
}

// The division of images into bands of whole rows of tiles. The tiles of a band are numbered row by row.
struct Bands {
  std::int64_t n, h, w;
  std::int64_t across, down;  // tiles of an image
  std::int64_t rows;          // rows of tiles in a band, which may belong to several images
  Bands(std::int64_t n, std::int64_t h, std::int64_t w)
      : n(n), h(h), w(w), across(divide_up(w, 2)), down(divide_up(h, 2)), rows(divide_up(kBandTiles, across)) {}
  std::int64_t tile_rows() const { return n * down; }  // of all images
  std::int64_t count() const { return divide_up(tile_rows(), rows); }
  std::int64_t tiles() const { return round_up(rows * across, kBandTiles); }  // including those that fill up a group
  std::int64_t first(std::int64_t band) const { return std::min(tile_rows(), band * rows); }
  // The first image row of a row of tiles, counted over all images.
  std::int64_t image_row(std::int64_t tile_row) const { return tile_row / down * h + tile_row % down * 2; }
  // The distance between two elements of a tile in a buffer with this number of channels. kLanes is added, because a
  // power of two would place all elements of a tile in a few sets of the cache.
  std::int64_t pitch(std::int64_t channels) const { return tiles() * channels + kLanes; }
};

// The division of images into strips: some whole images, or some rows of one image. If an image is not larger than a
// tile of the batch norm of these channels, a strip is such a tile. A chunk is a sequence of strips whose sums are
// added in order.
class Strips {
 public:
  Strips(const Bands& bands, std::int64_t channels) : bands(bands) {
    const Partition part = make_partition({true, bands.n, channels, bands.h * bands.w}, true);
    const std::int64_t elements = part.rows_per_tile * part.width, image = bands.h * bands.w * channels;
    images_ = std::max<std::int64_t>(1, elements / image);
    const std::int64_t most = std::max<std::int64_t>(1, elements / (2 * bands.w * channels));
    rows_ = divide_up(bands.down, divide_up(bands.down, most));
    pieces_ = divide_up(bands.down, rows_);
    count_ = divide_up(bands.n, images_) * pieces_;
    chunks_ =
        std::clamp<std::int64_t>(bands.n * bands.down * bands.across / kLeastTiles, 1, std::min(kMostChunks, count_));
  }

  std::int64_t count() const { return count_; }
  bool of_whole_images() const { return pieces_ == 1; }
  std::int64_t chunks() const { return chunks_; }
  // The first strip of a chunk.
  std::int64_t of_chunk(std::int64_t chunk) const { return chunk * count_ / chunks_; }
  // The first row of tiles of a strip, over all images.
  std::int64_t first(std::int64_t strip) const {
    return std::min(bands.n, strip / pieces_ * images_) * bands.down + strip % pieces_ * rows_;
  }
  // The most rows of images that a strip has, with those beside it.
  std::int64_t most_rows() const { return images_ > 1 ? images_ * bands.h : std::min(bands.h, 2 * rows_ + 2); }

  const Bands bands;

 private:
  static constexpr std::int64_t kLeastTiles = 256;  // the least number of tiles in a chunk
  std::int64_t images_;                             // of a strip
  std::int64_t pieces_, rows_;                      // strips of an image, and the rows of tiles in one of them
  std::int64_t count_, chunks_;
};

// Rows of w x C values. Row r, counted over all images, begins at data + (r - first) * w * C. The data may be a part of
// the images, from row `first` on.
struct ImageRows {
  const float* data;
  std::int64_t first;
};

// Prefetches the image rows of some rows of tiles, a 16th of them during each element of the previous band.
class BandPrefetch {
 public:
  BandPrefetch(const Bands& bands, std::int64_t first, std::int64_t last, ImageRows images, std::int64_t channels) {
    const std::int64_t row = bands.w * channels;
    from_ = reinterpret_cast<const char*>(images.data) +
            (bands.image_row(first) - images.first) * row * static_cast<std::int64_t>(sizeof(float));
    bytes_ = (bands.image_row(last) - bands.image_row(first)) * row * static_cast<std::int64_t>(sizeof(float));
  }
  BNKERN_INLINE void prefetch(int element) const {
    for (std::int64_t k = bytes_ * element / kElements; k < bytes_ * (element + 1) / kElements; k += 64)
      __builtin_prefetch(from_ + k, 0, 2);
  }

 private:
  const char* from_;
  std::int64_t bytes_;
};

// Rows that are read later, and are prefetched in equal shares while a convolution computes.
class Ahead {
 public:
  void add(const float* rows, std::int64_t count) {
    if (rows && count > 0)
      ranges_[size_++] = {reinterpret_cast<const char*>(rows), reinterpret_cast<const char*>(rows + count), 0};
  }
  // Divides the rows among this number of steps.
  void divide(std::int64_t steps) {
    for (int i = 0; i < size_; ++i) ranges_[i].share = divide_up(ranges_[i].end - ranges_[i].next, steps);
  }
  // Prefetches the share of the next step.
  BNKERN_INLINE void prefetch() {
    for (int i = 0; i < size_; ++i) {
      Range& range = ranges_[i];
      const char* const end = std::min(range.next + range.share, range.end);
      for (; range.next < end; range.next += 64) __builtin_prefetch(range.next, 0, 2);
    }
  }

 private:
  struct Range {
    const char *next, *end;
    std::int64_t share;
  };
  Range ranges_[4];
  int size_ = 0;
};

// Computes B' d B for a row of tiles, and stores it from the tile at `out` on. `row` counts the rows of tiles of all
// images. `zeros` is a row of zeros.
template <bool kAbsolute>
BNKERN_INLINE void input_tiles(const Bands& bands, std::int64_t row, ImageRows x, std::int64_t channels,
                               const float* zeros, float* out, std::int64_t pitch) {
  using V = Vec<float>;
  const std::int64_t top = row % bands.down * 2 - 1;
  const float* rows[4];
  for (int i = 0; i < 4; ++i)
    rows[i] = top + i >= 0 && top + i < bands.h
                  ? x.data + (row / bands.down * bands.h + top + i - x.first) * bands.w * channels
                  : zeros;
  const auto column = [&](std::int64_t w, std::int64_t c, V* to) {  // B' d
    const auto load = [&](int i) {
      const V value = V::load(rows[i] + w * channels + c);
      return kAbsolute ? magnitude(value) : value;
    };
    const V a = load(0), b = load(1), d = load(2), e = load(3);
    to[0] = a - d, to[1] = b + d, to[2] = d - b, to[3] = b - e;
  };
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    V first[4], second[4], third[4], fourth[4];  // B' d of the tile's four columns
    for (int i = 0; i < 4; ++i) first[i] = V::all(0);
    column(0, c, second);
    float* to = out + c;
    for (std::int64_t tile = 0; tile < bands.across; ++tile, to += channels) {
      const std::int64_t w = 2 * tile + 1;
      if (w + 1 < bands.w) {
        column(w, c, third);
        column(w + 1, c, fourth);
      } else {
        for (int i = 0; i < 4; ++i) third[i] = fourth[i] = V::all(0);
        if (w < bands.w) column(w, c, third);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        (first[i] - third[i]).store(to + 4 * i * pitch);
        (second[i] + third[i]).store(to + (4 * i + 1) * pitch);
        (third[i] - second[i]).store(to + (4 * i + 2) * pitch);
        (second[i] - fourth[i]).store(to + (4 * i + 3) * pitch);
        first[i] = third[i], second[i] = fourth[i];
      }
    }
  }
}

// The convolution of Conv3x3 for some rows at a time. Threads share the object.
class RowConvolution {
 public:
  virtual ~RowConvolution() = default;
  virtual std::int64_t scratch() const = 0;  // the number of floats that a thread needs
  // Transforms the weights. All threads of a parallel region call it and divide its loop among them.
  virtual void prepare(float* scratch) = 0;
  // Computes the rows of tiles first, ..., last - 1, from `x`. Writes to y of Conv3x3. Without `ahead` it prefetches x.
  virtual void run(std::int64_t first, std::int64_t last, ImageRows x, float* scratch, Ahead* ahead) const = 0;
};
// `addend` is added to y if it is not null. It has the shape of y.
std::unique_ptr<RowConvolution> row_convolution(const Conv3x3& p, const float* addend = nullptr);

// The weight gradient of this convolution, or the sum of the magnitudes of its summands. For each chunk call begin(),
// add() for each of its strips, and end().
class RowGradient {
 public:
  virtual ~RowGradient() = default;
  virtual std::int64_t scratch() const = 0;
  virtual void begin(float* scratch) const = 0;
  virtual void add(std::int64_t first, std::int64_t last, ImageRows x, ImageRows dy, float* scratch,
                   Ahead* ahead) const = 0;
  virtual void end(std::int64_t chunk, float* scratch) = 0;
  // Writes the sum over all chunks to result [O, I, 3, 3]. All threads of a parallel region call it and divide its
  // loop.
  virtual void join(float* result) const = 0;
};
std::unique_ptr<RowGradient> row_gradient(const Strips& strips, std::int64_t inputs, std::int64_t outputs,
                                          bool absolute);

}  // namespace bnkern::BNKERN_ISA
