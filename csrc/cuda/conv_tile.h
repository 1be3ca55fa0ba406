// A 3 x 3 convolution of stride and padding 1 of one image by one block, with C inputs and C outputs in half precision.
//
// The whole image with a border of zeros and all weights are in shared memory, so no block needs a value of another
// one. multiply_add() computes the product of the weights, as a matrix of 16 outputs, with the inputs of 8 pixels. A
// warp has kOutputTiles tiles of 16 outputs and up to kPixelTiles tiles of 8 pixels, every kPixelWarps-th one. All sums
// of an image stay in registers, at most 64 for each thread.
//
// The columns of a and the rows of b in a product may be the input channels in any order, if both have the same one.
// Lane t of four has the columns 2t, 2t + 1, 2t + 8 and 2t + 9, which are the channels 4t to 4t + 3 here. So a lane has
// adjacent channels: b needs one load of 8 bytes, whose words are in adjacent registers as the product wants them, and
// a needs two and four moves. The rows of a may be the outputs in any order too. Row g is output 2g and row g + 8
// output 2g + 1 of a tile, so the two sums of a lane for a pixel are adjacent in memory.
//
// A load of 8 bytes serves 16 lanes at a time, which read 32 bytes of each of 4 pixels or outputs. A distance of 32, 96
// or 160 bytes between those puts the four into different banks. Without the padding of 32 bytes the distances 64 and
// 128 would take two and four times as long. A step of a warp costs 36 passes for 16 products with 16 channels, 16 for
// 8 with 32, and 12 for 4 with 64, which is more than the products are expected to take.
#pragma once

#include "device.h"

namespace bnkern {

constexpr int kConvThreads = 256;
constexpr int kConvValues = 16384;  // the most values of an image: 64 sums for each thread

template <int C>
struct ConvTile {
  static constexpr int kOctets = C / 8;                      // of a pixel
  static constexpr int kStride = 2 * C + (C > 16 ? 32 : 0);  // bytes from a pixel, or a weight's row, to the next
  static constexpr int kWeightBytes = 9 * C * kStride;
  static constexpr int kOutputTiles = C == 32 ? 2 : 1;          // of a warp
  static constexpr int kOutputWarps = C / (16 * kOutputTiles);  // warps with the same pixels
  static constexpr int kPixelWarps = kConvThreads / 32 / kOutputWarps;
  static constexpr int kPixelTiles = kConvValues / C / 8 / kPixelWarps;   // the most tiles of a warp
  static constexpr int kOctetsOfThread = kConvValues / 8 / kConvThreads;  // the most octets of an image
  // From a pixel to the next where a result is put together for stores of 16 bytes. With this distance the lanes of a
  // warp, which store 32 bytes of each of 4 pixels, use different banks.
  static constexpr int kResultStride = 2 * C + 16;
};

struct ConvPlan {
  int h, w, pixels;
  Divider width;     // by w
  int tiles;         // for how many tiles of pixels a warp computes sums: 1, 2, 4, 8 or 16
  bool whole_words;  // whether eight inputs of a weight are adjacent and aligned to 16 bytes, in the order [o][tap][i]
  Count all;         // the values of a channel in all images
  Chains chains;     // join the parts of all images

  BNKERN_HD int bordered() const { return (h + 2) * (w + 2); }
};

// The tiles of a thread's warp, and its lane.
template <int C>
struct ConvCoord {
  int group, in_group, pixel_warp, output_warp;  // the lane is group * 4 + in_group

  BNKERN_DEVICE ConvCoord() {
    const int t = static_cast<int>(threadIdx.x), warp = t / 32;
    group = t % 32 / 4, in_group = t % 4;
    pixel_warp = warp % ConvTile<C>::kPixelWarps, output_warp = warp / ConvTile<C>::kPixelWarps;
  }
  // The first pixel of a tile. A pixel exists if it is less than plan.pixels.
  BNKERN_DEVICE int pixels_of(int tile) const { return (tile * ConvTile<C>::kPixelWarps + pixel_warp) * 8; }
  // The first output of a tile.
  BNKERN_DEVICE int outputs_of(int tile) const { return (output_warp * ConvTile<C>::kOutputTiles + tile) * 16; }
  // The two pixels of a lane's sums, and the first of their two outputs.
  BNKERN_DEVICE int pixel(int tile, int which) const { return pixels_of(tile) + in_group * 2 + which; }
  BNKERN_DEVICE int output(int tile) const { return outputs_of(tile) + group * 2; }
};

// The offset in bytes of a pixel's upper left neighbour in the bordered image.
template <int C>
BNKERN_DEVICE int neighbour_offset(const ConvPlan& plan, int pixel) {
  return (pixel + 2 * static_cast<int>(plan.width.divide(pixel))) * ConvTile<C>::kStride;
}

// The octets of an image that a thread has. All have the same channels. Octet k exists if its pixel is less than
// plan.pixels.
template <int C>
struct ConvOctets {
  int first, column;  // the first pixel, and the octet within a pixel
  BNKERN_DEVICE ConvOctets()
      : first(static_cast<int>(threadIdx.x) / ConvTile<C>::kOctets),
        column(static_cast<int>(threadIdx.x) % ConvTile<C>::kOctets) {}
  BNKERN_DEVICE int pixel(int k) const { return first + k * (kConvThreads / ConvTile<C>::kOctets); }
  // The index of octet k in an image in global memory.
  BNKERN_DEVICE int index(int k) const { return pixel(k) * ConvTile<C>::kOctets + column; }
};

// Loads a thread's octets of an image. All loads are issued before the first value is used.
template <class T, int C>
BNKERN_DEVICE void load_image(Octet<T> (&octets)[ConvTile<C>::kOctetsOfThread], const void* images,
                              const ConvPlan& plan, const ConvOctets<C>& own) {
  const T* const image = static_cast<const T*>(images) + std::int64_t(blockIdx.x) * plan.pixels * C;
#pragma unroll
  for (int k = 0; k < ConvTile<C>::kOctetsOfThread; ++k)
    if (own.pixel(k) < plan.pixels) octets[k] = Octet<T>::load(image + own.index(k) * 8);
}

// Puts an octet into the bordered image.
template <class T, int C>
BNKERN_DEVICE void put_octet(char* image, const ConvPlan& plan, const ConvOctets<C>& own, int k,
                             const Octet<T>& octet) {
  const int centre = neighbour_offset<C>(plan, own.pixel(k)) + (plan.w + 3) * ConvTile<C>::kStride;
  *reinterpret_cast<Words*>(image + centre + own.column * 16) = octet.words[0];
}

// Sets the border of the image to zero: the upper and the lower row, then both sides.
template <int C>
BNKERN_DEVICE void clear_border(char* image, const ConvPlan& plan) {
  const int wide = plan.w + 2, pixels = 2 * wide + 2 * plan.h;
  const ConvOctets<C> own;
  for (int b = own.first; b < pixels; b += kConvThreads / ConvTile<C>::kOctets) {
    const int side = b - 2 * wide;
    const int row = side < 0 ? (b < wide ? 0 : plan.h + 1) : 1 + side / 2;
    const int column = side < 0 ? b % wide : side % 2 * (wide - 1);
    *reinterpret_cast<Words*>(image + (row * wide + column) * ConvTile<C>::kStride + own.column * 16) = Words{};
  }
}

// The offset in bytes of the weights of a tap and an output in shared memory. Output 2g of a tile is row g, and output
// 2g + 1 row g + 8.
template <int C>
BNKERN_DEVICE int weight_place(int tap, int output) {
  return (tap * C + output / 16 * 16 + output % 2 * 8 + output % 16 / 2) * ConvTile<C>::kStride;
}

// The weights that a thread copies to shared memory, if they can be read 16 bytes at a time.
template <int C>
struct ConvWeights {
  static constexpr int kAll = 9 * C * ConvTile<C>::kOctets;
  static constexpr int kOfThread = (kAll + kConvThreads - 1) / kConvThreads;
  Words words[kOfThread];

  static BNKERN_DEVICE int index(int k) { return static_cast<int>(threadIdx.x) + k * kConvThreads; }
  BNKERN_DEVICE void load(const void* weight) {
#pragma unroll
    for (int k = 0; k < kOfThread; ++k)
      if (index(k) < kAll) words[k] = load_words(static_cast<const Words*>(weight) + index(k));
  }
  BNKERN_DEVICE void store(char* shared) const {
#pragma unroll
    for (int k = 0; k < kOfThread; ++k) {
      const int row = index(k) / ConvTile<C>::kOctets, octet = index(k) % ConvTile<C>::kOctets;  // row: [o][tap]
      const int place = weight_place<C>(row % 9, row / 9) + octet * 16;
      if (index(k) < kAll) *reinterpret_cast<Words*>(shared + place) = words[k];
    }
  }
};

// Copies weights with any strides, one at a time.
template <class T, int C, class Call>
BNKERN_DEVICE void copy_weights(const Call& p, char* shared) {
  const T* const weight = static_cast<const T*>(p.weight);
#pragma unroll 3
  for (int k = static_cast<int>(threadIdx.x); k < 9 * C * C; k += kConvThreads) {
    const int tap = k % 9, input = k / 9 % C, output = k / 9 / C;  // the order of a contiguous weight
    const std::int64_t from =
        output * p.weight_output + input * p.weight_input + tap / 3 * p.weight_h + tap % 3 * p.weight_w;
    *reinterpret_cast<T*>(shared + weight_place<C>(tap, output) + input * 2) = weight[from];
  }
}

// The sums of a lane for each tile of outputs and of pixels: output 0 of both pixels, then output 1 (multiply_add).
template <int C>
struct ConvSums {
  float value[ConvTile<C>::kOutputTiles][ConvTile<C>::kPixelTiles][4];
};

// Computes the sums of the first TILES tiles of pixels. Pixels that do not exist are computed as the first one, because
// a branch for each tile would keep the loads of a tile behind the products of the one before it.
template <class T, int C, int TILES>
BNKERN_DEVICE void add_products(ConvSums<C>* sums, const char* image, const char* weights, const ConvPlan& plan,
                                const ConvCoord<C>& coord) {
  using Tile = ConvTile<C>;
  const char* pixels[TILES];
#pragma unroll
  for (int j = 0; j < TILES; ++j) {
    const int pixel = coord.pixels_of(j) + coord.group;
    pixels[j] = image + neighbour_offset<C>(plan, pixel < plan.pixels ? pixel : 0) + coord.in_group * 8;
  }
  const char* rows = weights + (coord.outputs_of(0) + coord.group) * Tile::kStride + coord.in_group * 8;
#pragma unroll 1
  for (int tap_row = 0; tap_row < 3; ++tap_row) {
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
      for (int channels = 0; channels < 2 * C; channels += 32) {
        std::uint32_t a[Tile::kOutputTiles][4];
#pragma unroll
        for (int i = 0; i < Tile::kOutputTiles; ++i) {
          const TwoWords even = load_operand(rows + (tap * C + i * 16) * Tile::kStride + channels);
          const TwoWords odd = load_operand(rows + (tap * C + i * 16 + 8) * Tile::kStride + channels);
          a[i][0] = even.word[0], a[i][1] = odd.word[0], a[i][2] = even.word[1], a[i][3] = odd.word[1];
        }
#pragma unroll
        for (int j = 0; j < TILES; ++j) {
          const TwoWords b = load_operand(pixels[j] + tap * Tile::kStride + channels);
#pragma unroll
          for (int i = 0; i < Tile::kOutputTiles; ++i)
            multiply_add(sums->value[i][j], a[i], b, static_cast<T*>(nullptr));
        }
      }
    rows += 3 * C * Tile::kStride;
#pragma unroll
    for (int j = 0; j < TILES; ++j) pixels[j] += (plan.w + 2) * Tile::kStride;
  }
}

// The convolution of the block's image. The sums of pixels that do not exist are undefined.
template <class T, int C>
BNKERN_DEVICE ConvSums<C> convolve(const char* image, const char* weights, const ConvPlan& plan,
                                   const ConvCoord<C>& coord) {
  ConvSums<C> sums{};
  switch (plan.tiles) {
    case 1:
      add_products<T, C, 1>(&sums, image, weights, plan, coord);
      break;
    case 2:
      add_products<T, C, 2>(&sums, image, weights, plan, coord);
      break;
    case 4:
      add_products<T, C, 4>(&sums, image, weights, plan, coord);
      break;
    case 8:
      add_products<T, C, 8>(&sums, image, weights, plan, coord);
      break;
    default:
      if constexpr (ConvTile<C>::kPixelTiles == 16) add_products<T, C, 16>(&sums, image, weights, plan, coord);
  }
  return sums;
}

}  // namespace bnkern
