// Winograd's F(2 x 2, 3 x 3): 2 x 2 outputs of a 3 x 3 convolution of stride 1 from 4 x 4 inputs by 16 products where
// the definition takes 36 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016). With g the
// weight, d the inputs and y the outputs of a tile, sums over channels left out:
//
//   y = A' [(G g G') . (B' d B)] A,   and so for gradients   dg = G' [(B' d B) . (A dy A')] G,
//
//   B' = 1  0 -1  0    G = 1    0    0      A' = 1  1  1  0
//        0  1  1  0        1/2  1/2  1/2         0  1 -1 -1
//        0 -1  1  0        1/2 -1/2  1/2
//        0  1  0 -1        0    0    1
//
// Each of the 16 places of a tile is a matrix product on its own, of tiles by channels. Factors of all tiles of a band,
// some rows of tiles, lie as [place][tile][channel]. Every sum's order depends on shapes alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "conv.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {

constexpr int kPlaces = 16;              // of a tile
constexpr std::int64_t kBandTiles = 16;  // or the next whole row of tiles; buffers have room for a multiple of it

inline void check_channels(std::int64_t inputs, std::int64_t outputs) {
  if (inputs % kLanes || outputs % kLanes) throw std::invalid_argument("conv3x3: channels must be multiples of 16");
}

// Images cut into bands of whole rows of tiles, a band's tiles numbered row by row.
struct Bands {
  std::int64_t n, h, w;
  std::int64_t across, down;  // tiles of an image
  std::int64_t rows;          // of tiles in a band; they may be of several images
  Bands(std::int64_t n, std::int64_t h, std::int64_t w)
      : n(n), h(h), w(w), across(divide_up(w, 2)), down(divide_up(h, 2)), rows(divide_up(kBandTiles, across)) {}
  std::int64_t count() const { return divide_up(n * down, rows); }
  std::int64_t tiles() const { return round_up(rows * across, kBandTiles); }  // with those that fill up a group
  std::int64_t first(std::int64_t band) const { return band * rows; }
  std::int64_t last(std::int64_t band) const { return std::min(n * down, (band + 1) * rows); }
  // From one place to the next in a buffer of so many channels: not a power of two, which would put the places of a
  // tile into the same few sets of a cache.
  std::int64_t pitch(std::int64_t channels) const { return tiles() * channels + kLanes; }
};

// Calls for the images' rows that a band's tiles are of, a 16th of them for each place of the band before.
class RowsAhead {
 public:
  RowsAhead(const Bands& bands, std::int64_t band, const float* images, std::int64_t channels) {
    const std::int64_t row = bands.w * channels, all = bands.n * bands.h;
    const auto at = [&](std::int64_t tiles) {  // the first row of the images that is below so many rows of tiles
      return std::min(all, tiles / bands.down * bands.h + tiles % bands.down * 2);
    };
    const std::int64_t first = at(bands.first(band)), last = at(bands.last(band));
    from_ = reinterpret_cast<const char*>(images + first * row);
    bytes_ = (last - first) * row * static_cast<std::int64_t>(sizeof(float));
  }
  BNKERN_INLINE void call(int place) const {
    for (std::int64_t k = bytes_ * place / kPlaces; k < bytes_ * (place + 1) / kPlaces; k += 64)
      __builtin_prefetch(from_ + k, 0, 2);
  }

 private:
  const char* from_;
  std::int64_t bytes_;
};

// B' d B of a row of tiles: `row` of all images' rows of tiles, to the tiles from `out` on. `zeros` is a row of zeros.
template <bool kAbsolute>
BNKERN_INLINE void input_tiles(const Bands& bands, std::int64_t row, const float* x, std::int64_t channels,
                               const float* zeros, float* out, std::int64_t pitch) {
  using V = Vec<float>;
  const std::int64_t top = row % bands.down * 2 - 1;
  const float* rows[4];
  for (int i = 0; i < 4; ++i)
    rows[i] =
        top + i >= 0 && top + i < bands.h ? x + (row / bands.down * bands.h + top + i) * bands.w * channels : zeros;
  const auto column = [&](std::int64_t w, std::int64_t c, V* to) {  // B' d
    const auto at = [&](int i) {
      const V value = V::load(rows[i] + w * channels + c);
      return kAbsolute ? magnitude(value) : value;
    };
    const V a = at(0), b = at(1), d = at(2), e = at(3);
    to[0] = a - d, to[1] = b + d, to[2] = d - b, to[3] = b - e;
  };
  for (std::int64_t c = 0; c < channels; c += kLanes) {
    V before[4], here[4], after[4], last[4];
    for (int i = 0; i < 4; ++i) before[i] = V::all(0);
    column(0, c, here);
    float* to = out + c;
    for (std::int64_t tile = 0; tile < bands.across; ++tile, to += channels) {
      const std::int64_t w = 2 * tile + 1;
      if (w + 1 < bands.w) {
        column(w, c, after);
        column(w + 1, c, last);
      } else {
        for (int i = 0; i < 4; ++i) after[i] = last[i] = V::all(0);
        if (w < bands.w) column(w, c, after);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        (before[i] - after[i]).store(to + 4 * i * pitch);
        (here[i] + after[i]).store(to + (4 * i + 1) * pitch);
        (after[i] - here[i]).store(to + (4 * i + 2) * pitch);
        (here[i] - last[i]).store(to + (4 * i + 3) * pitch);
        before[i] = after[i], here[i] = last[i];
      }
    }
  }
}

}  // namespace bnkern::BNKERN_ISA
