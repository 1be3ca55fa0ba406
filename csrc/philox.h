// Philox4x32-10, a counter-based random number generator: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
// easy as 1, 2, 3", SC 2011. The same generator is in bnkern/backends/reference/images.py and in Triton itself.
#pragma once

#include <cstdint>

#include "math.h"

namespace bnkern {

struct Philox {
  std::uint32_t word[4];
};

// The four words for a key (the seed) and a counter of four words.
BNKERN_HD Philox philox(std::uint64_t key, Philox counter) {
  std::uint32_t k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  auto& c = counter.word;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
    c[0] = static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<std::uint32_t>(b);
    c[2] = static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<std::uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return counter;
}

// Maps a word to a number below n. Each number has the probability 1 / n to within 2^-32.
BNKERN_HD std::uint32_t below(std::uint32_t n, std::uint32_t word) {
  return static_cast<std::uint32_t>(std::uint64_t{word} * n >> 32);
}

}  // namespace bnkern
