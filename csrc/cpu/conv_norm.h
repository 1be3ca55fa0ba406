// Shared by conv_norm_forward.cpp and conv_norm_backward.cpp, which compute a 3 x 3 convolution together with the
// phases of the batch norms before and behind it. All work on a strip (winograd.h) is done while its values are in the
// second-level cache: the phases of the batch norms by the functions of tiles.h, the convolution by those of
// winograd.h. The convolution needs one more row on both sides of a strip within an image.
//
// If the strips are whole images they are also the tiles of the batch norms' own kernels. Then all results have the
// bits of these kernels and of the convolution's, called one after the other.
#pragma once

#include <omp.h>

#include "drive.h"
#include "winograd.h"

namespace bnkern::BNKERN_ISA {

// A strip's own rows of all images, and those with the rows that the convolution needs beside them.
struct StripRows {
  std::int64_t first, last, wide_first, wide_last;
  StripRows(const Strips& strips, std::int64_t strip)
      : StripRows(strips.bands, strips.first(strip), strips.first(strip + 1)) {}
  StripRows(const Bands& bands, std::int64_t from, std::int64_t to)
      : first(bands.image_row(from)),
        last(bands.image_row(to)),
        wide_first(first - (from % bands.down != 0)),
        wide_last(last + (to % bands.down != 0)) {}
  // The values of these rows in a tensor of all images whose rows have `row` values.
  void add_to(Ahead& ahead, const void* images, std::int64_t row) const {
    if (images) ahead.add(static_cast<const float*>(images) + first * row, (last - first) * row);
  }
};

// The channels of rows of images as the functions of tiles.h read them: several pixels form a wide row.
class WideRows {
 public:
  WideRows(std::int64_t w, std::int64_t channels) : w_(w), channels_(channels) {
    std::int64_t pixels = 1;
    while (pixels * channels < kWideRow && w % (2 * pixels) == 0) pixels *= 2;
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
// `active` receives the sums of a record, if it has memory.
inline void normalize_rows(const Forward& input, const Coefficients<float>& k, const WideRows& rows, std::int64_t first,
                           std::int64_t last, float* y, bool with_mask, Rows<float> active = {}) {
  if (first >= last) return;
  Tensors<float> t{};
  t.x = rows.view(input.x.data, first), t.residual = rows.view(input.residual.data, first), t.y = rows.view(y, 0);
  t.mask = with_mask && input.mask ? input.mask + first * rows.row() / 8 : nullptr, t.act = input.act;
  const Partition part = rows.partition(last - first);
  for (std::int64_t group = 0; group < part.groups; ++group)
    active.data ? normalize_tile<float, true>(part, t, k, group, 0, active.at(group * part.group))
                : normalize_tile<float, false>(part, t, k, group, 0, {});
}

// Some sums for each wide channel of each strip: [strip][row][width]. They are joined in the order of the strips.
template <class A>
class StripSums {
 public:
  StripSums(std::int64_t strips, int rows, const WideRows& wide)
      : strips_(strips),
        rows_(rows),
        width_(wide.width()),
        space_(rows ? rows * strips * width_ * static_cast<std::int64_t>(sizeof(A)) : 1),
        data_(reinterpret_cast<A*>(space_.data())) {}
  int rows() const { return rows_; }
  Rows<A> operator[](std::int64_t strip) const { return {data_ + rows_ * strip * width_, width_}; }
  // The same, set to zero, or no memory if there are no rows.
  Rows<A> cleared(std::int64_t strip) const {
    if (!rows_) return {};
    const Rows<A> sums = (*this)[strip];
    std::memset(sums.data, 0, rows_ * width_ * sizeof(A));
    return sums;
  }
  // The sum of one row over all strips and over the wide channels of a channel.
  double total(int row, const Columns& columns) const {
    double sum = 0;
    for (std::int64_t strip = 0; strip < strips_; ++strip)
      for (std::int64_t v = columns.first; v < columns.end; v += columns.step)
        sum += static_cast<double>((*this)[strip][row][v]);
    return sum;
  }

 private:
  const std::int64_t strips_;
  const int rows_;
  const std::int64_t width_;
  const PoolSpace space_;
  A* const data_;
};

}  // namespace bnkern::BNKERN_ISA
