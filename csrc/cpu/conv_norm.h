// Shared by conv_norm_forward.cpp and conv_norm_backward.cpp, which compute a 3 x 3 convolution together with the
// phases of the batch norms before and behind it.
//
// A strip is a number of whole images, or some rows of one image. All work on a strip is done while its values are in
// the second-level cache: the phases of the batch norm by the functions of tiles.h, the convolution by those of
// winograd.h. The convolution needs one more row on both sides of a strip within an image. A chunk is a sequence of
// strips, which one thread processes in order. Strips and chunks depend on shapes alone, and so does the order of sums.
#pragma once

#include <omp.h>

#include "drive.h"
#include "winograd.h"

namespace bnkern::BNKERN_ISA {

constexpr std::int64_t kStripElements = 16384;  // of the tensor with more channels

class Strips {
 public:
  Strips(const Bands& bands, std::int64_t channels)
      : bands(bands), images_(std::max<std::int64_t>(1, kStripElements / (bands.h * bands.w * channels))) {
    const std::int64_t most = std::max<std::int64_t>(1, kStripElements / (2 * bands.w * channels));
    rows_ = divide_up(bands.down, divide_up(bands.down, most));
    pieces_ = divide_up(bands.down, rows_);
    count_ = divide_up(bands.n, images_) * pieces_;
    chunks_ = std::min(count_, kMostChunks);
  }

  std::int64_t chunks() const { return chunks_; }
  std::int64_t first_of_chunk(std::int64_t chunk) const { return chunk * count_ / chunks_; }
  // The first row of tiles of a strip, over all images.
  std::int64_t first(std::int64_t strip) const {
    return std::min(bands.n, strip / pieces_ * images_) * bands.down + strip % pieces_ * rows_;
  }
  // The most rows of an image that the work on a strip reads.
  std::int64_t most_rows() const { return images_ > 1 ? images_ * bands.h : std::min(bands.h, 2 * rows_ + 2); }

  const Bands bands;

 private:
  const std::int64_t images_;   // images of a strip
  std::int64_t pieces_, rows_;  // strips of an image, and the rows of tiles in one of them
  std::int64_t count_, chunks_;
};

// A strip's own rows of all images, and those with the rows that the convolution needs beside them.
struct StripRows {
  std::int64_t first, last, wide_first, wide_last;
  StripRows(const Bands& bands, std::int64_t from, std::int64_t to)
      : first(bands.image_row(from)),
        last(bands.image_row(to)),
        wide_first(first - (from % bands.down != 0)),
        wide_last(last + (to % bands.down != 0)) {}
};

// The channels of rows of images as the functions of tiles.h read them: several pixels form a wide row.
class WideRows {
 public:
  WideRows(std::int64_t w, std::int64_t channels) : w_(w), channels_(channels), width_(channels) {
    for (std::int64_t pixels = 2; w % pixels == 0 && pixels * channels <= kWideRow; pixels *= 2)
      width_ = pixels * channels;
  }
  std::int64_t row() const { return w_ * channels_; }
  std::int64_t width() const { return width_; }

  // The partition of some rows of images into one tile.
  Partition partition(std::int64_t rows) const {
    Partition part{};
    part.shape = {true, 1, channels_, rows * w_};
    part.dense = true;
    part.width = width_;
    part.group = std::min(width_, kGroupChannels);
    part.groups = divide_up(width_, part.group);
    part.rows = part.rows_per_tile = rows * row() / width_;
    part.tiles = part.tiles_per_block = 1;
    return part;
  }
  View view(const void* data, std::int64_t first_row) const {
    return data ? View{const_cast<float*>(static_cast<const float*>(data)) + first_row * row(), channels_, 1} : View{};
  }

 private:
  std::int64_t w_, channels_, width_;
};

// The number of doubles or floats of coefficients(), and of the totals of a chunk.
inline Coefficients<float> make_coefficients(Workspace& space, const WideRows& rows) {
  Coefficients<float> k{};
  for (float** array : {&k.mean, &k.invstd, &k.weight, &k.bias, &k.mean_dy, &k.mean_dy_xhat, &k.scale})
    *array = space.take<float>(rows.width());
  return k;
}
inline std::int64_t coefficients_bytes(const WideRows& rows) { return 7 * Workspace::bytes<float>(rows.width()); }

// Writes the coefficients of a batch norm. Each channel has width / C places.
inline void set_coefficients(const Coefficients<float>& k, const WideRows& rows, std::int64_t channels,
                             const void* mean, const void* invstd, const ChannelVector& weight,
                             const ChannelVector& bias) {
  for (std::int64_t c = 0; c < channels; ++c) {
    const Columns columns{c, rows.width(), channels};
    const float scale = read(weight, c, 1.0f), deviation = static_cast<const float*>(invstd)[c];
    set_all(k.mean, columns, static_cast<const float*>(mean)[c]);
    set_all(k.invstd, columns, deviation);
    set_all(k.weight, columns, scale);
    set_all(k.bias, columns, read(bias, c, 0.0f));
    set_all(k.scale, columns, scale * deviation);
  }
}

// Normalises rows of images. `input` is the call of normalize for all images.
inline void normalize_rows(const Forward& input, const Coefficients<float>& k, const WideRows& rows, std::int64_t first,
                           std::int64_t last, float* y, bool with_mask) {
  if (first >= last) return;
  Tensors<float> t{};
  t.x = rows.view(input.x.data, first), t.residual = rows.view(input.residual.data, first), t.y = rows.view(y, 0);
  t.mask = with_mask && input.mask ? input.mask + first * rows.row() / 8 : nullptr, t.act = input.act;
  const Partition part = rows.partition(last - first);
  for (std::int64_t group = 0; group < part.groups; ++group) normalize_tile<float, false>(part, t, k, group, 0, {});
}

// The partial sums of chunks, [chunk][2][width], and the number of values that each has per wide channel.
class ChunkTotals {
 public:
  ChunkTotals(Workspace& space, std::int64_t chunks, const WideRows& rows)
      : chunks_(chunks),
        width_(rows.width()),
        data_(space.take<double>(2 * chunks * rows.width())),
        counts_(space.take<double>(chunks)) {}
  static std::int64_t bytes(std::int64_t chunks, const WideRows& rows) {
    return Workspace::bytes<double>(2 * chunks * rows.width()) + Workspace::bytes<double>(chunks);
  }
  Rows<double> of(std::int64_t chunk) const { return {data_ + 2 * chunk * width_, width_}; }
  double& count(std::int64_t chunk) const { return counts_[chunk]; }
  void clear(std::int64_t chunk) const {
    std::memset(data_ + 2 * chunk * width_, 0, 2 * width_ * sizeof(double));
    counts_[chunk] = 0;
  }

 private:
  std::int64_t chunks_, width_;
  double *data_, *counts_;
};

}  // namespace bnkern::BNKERN_ISA
