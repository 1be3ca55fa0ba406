// augment: a batch of images in one pass. Each is found by its number, moved and mirrored by its own random words,
// and every pixel looked up in the table of normalised values, so that all devices give the same bits.
#include <cstring>
#include <type_traits>

#include "../philox.h"
#include "cpu.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr int kChannels = 3, kSide = 32, kPad = 4, kPlane = kSide * kSide, kImage = kChannels * kPlane;
constexpr std::uint32_t kStream = 1;       // of the generator: crops and flips
constexpr std::int64_t kThreadImages = 8;  // fewer are not worth another thread
constexpr std::int64_t kAhead = 64;        // bytes in a line of the cache

// The window of an image, within kPad zeros on every side, that begins `down` and `right`.
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
void look_up(const std::uint8_t* pixels, const T* table, bool rows, T* out) {
  if (rows) {
    for (int i = 0; i < kPlane; ++i)
      for (int c = 0; c < kChannels; ++c) out[i * kChannels + c] = table[c * 256 + pixels[c * kPlane + i]];
  } else {
    for (int c = 0; c < kChannels; ++c)
      for (int i = 0; i < kPlane; ++i) out[c * kPlane + i] = table[c * 256 + pixels[c * kPlane + i]];
  }
}

template <class T>
void augment_as(const Augment& p) {
  const T* const table = static_cast<const T*>(p.table);
  const std::int64_t enough = 1 + p.count / kThreadImages;
  const int threads = enough < p.threads ? static_cast<int>(enough) : p.threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t i = 0; i < p.count; ++i) {
    const std::int64_t index = p.chosen[i];
    const std::uint8_t* pixels = p.images + index * kImage;
    if (i + 1 < p.count)
      for (std::int64_t k = 0; k < kImage; k += kAhead) __builtin_prefetch(p.images + p.chosen[i + 1] * kImage + k);
    std::uint8_t window[kImage];
    if (p.random) {
      const auto [w] = philox(p.seed, {{p.epoch, static_cast<std::uint32_t>(index), kStream, 0}});
      const int down = static_cast<int>(below(2 * kPad + 1, w[0])), right = static_cast<int>(below(2 * kPad + 1, w[1]));
      crop(pixels, down, right, w[2] >> 31, window);
      pixels = window;
    }
    look_up(pixels, table, p.rows, static_cast<T*>(p.out) + i * kImage);
    p.labels_out[i] = p.labels[index];
  }
}

}  // namespace

void augment(const Augment& p) {
  with_dtype(p.dtype, [&](auto* t) { augment_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
