// augment: a batch of images in one pass. An image is selected by its index, and is cropped and flipped by its own
// random words. Each pixel is replaced by its entry in a table of normalised values, so all devices give the same bits.
#include <cstring>
#include <type_traits>

#include "../philox.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr int kChannels = 3, kSide = 32, kPad = 4, kPlane = kSide * kSide, kImage = kChannels * kPlane;
constexpr std::uint32_t kStream = 1;        // the generator's stream of crops and flips
constexpr std::int64_t kThreadImages = 16;  // the least number of images for one more thread
constexpr std::int64_t kCacheLine = 64;     // bytes

// Copies a window of an image that has kPad zeros on every side. The window begins at row `down` and column `right` of
// the padded image.
void crop(const std::uint8_t* image, int down, int right, bool flip, std::uint8_t* window) {
  std::uint8_t row[kSide + 2 * kPad] = {};
  for (int c = 0; c < kChannels; ++c) {
    for (int y = 0; y < kSide; ++y, window += kSide) {
      const int source = y + down - kPad;
      if (source < 0 || source >= kSide) {
        std::memset(window, 0, kSide);
        continue;
      }
      std::memcpy(row + kPad, image + c * kPlane + source * kSide, kSide);
      if (flip) {
        for (int x = 0; x < kSide; ++x) window[x] = row[right + kSide - 1 - x];
      } else {
        std::memcpy(window, row + right, kSide);
      }
    }
  }
}

template <class T>
void normalise(const std::uint8_t* pixels, const T* table, bool rows, T* out) {
  const int pixel = rows ? kChannels : 1, plane = rows ? 1 : kPlane;
  for (int i = 0; i < kPlane; ++i)
    for (int c = 0; c < kChannels; ++c) out[i * pixel + c * plane] = table[c * 256 + pixels[c * kPlane + i]];
}

template <class T>
void augment_as(const Augment& p) {
  const T* const table = static_cast<const T*>(p.table);
  const std::int64_t useful_threads = 1 + p.count / kThreadImages;
  const int threads = useful_threads < p.threads ? static_cast<int>(useful_threads) : p.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < p.count; ++i) {
    const std::int64_t index = p.chosen[i];
    const std::uint8_t* pixels = p.images + index * kImage;
    if (i + 1 < p.count)
      for (std::int64_t k = 0; k < kImage; k += kCacheLine) __builtin_prefetch(p.images + p.chosen[i + 1] * kImage + k);
    std::uint8_t window[kImage];
    if (p.random) {
      const auto [w] = philox(p.seed, {{p.epoch, static_cast<std::uint32_t>(index), kStream, 0}});
      const int down = static_cast<int>(below(2 * kPad + 1, w[0])), right = static_cast<int>(below(2 * kPad + 1, w[1]));
      crop(pixels, down, right, w[2] >> 31, window);
      pixels = window;
    }
    normalise(pixels, table, p.rows, static_cast<T*>(p.out) + i * kImage);
    p.labels_out[i] = p.labels[index];
  }
}

}  // namespace

void augment(const Augment& p) {
  with_dtype(p.dtype, [&](auto* t) { augment_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
