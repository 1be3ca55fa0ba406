// Every exchange of data between blocks. A block writes its partial result to global memory, passes one of the two
// signals below, and then reads the results of the other blocks.
//
// A signal is a word of the workspace. Each kernel leaves it at the value it had before, so no launch has to clear it.
// Memory order comes from one acquire-release addition by a block's first thread. A block barrier before and after it
// extends the order to the block's other threads.
//
// Data that is read after a signal must be read by plain loads, never through `const __restrict__` or load_words():
// those may return values from before the signal.
#pragma once

#include "../math.h"
#include "launch.h"

namespace bnkern {

// A barrier for all threads of `expected` blocks, which must all be resident. Exactly one block passes `first`. Each
// barrier flips the upper bit of the word and returns the other bits to zero, so the word needs no clearing.
BNKERN_DEVICE void barrier_of_blocks(unsigned* word, unsigned expected, bool first) {
  __syncthreads();
  if (expected == 1) return;
  if (threadIdx.x == 0) {
    constexpr unsigned kPhase = 0x80000000u;
    const unsigned before = add_acquire_release(word, first ? kPhase - (expected - 1) : 1u);
    while (((before ^ load_acquire(word)) & kPhase) == 0) {
    }
  }
  __syncthreads();
}

// All threads of `expected` blocks call this, in any order, resident or not. It returns true in the block that arrives
// last, which can then read the results that the others wrote before. The word is zero before and after.
BNKERN_DEVICE bool last_of_blocks(unsigned* word, unsigned expected) {
  __syncthreads();
  if (expected == 1) return true;
  int last = 0;
  if (threadIdx.x == 0) {
    last = add_acquire_release(word, 1u) == expected - 1;
    if (last) *word = 0;
  }
  return __syncthreads_or(last) != 0;
}

// The partial results of blocks, two numbers for each part k and channel c.
struct alignas(8) Pair {
  float first, second;
};
struct Partials {
  Pair* data;
  std::int64_t channels;
  BNKERN_DEVICE Pair& at(std::int64_t part, std::int64_t channel) const { return data[part * channels + channel]; }
};

}  // namespace bnkern
