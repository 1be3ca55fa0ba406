// Every exchange of data between blocks. A block writes its partial result to global memory, passes one of the two
// signals below, and then reads the results of the other blocks.
//
// A signal is one word of the workspace. Every kernel leaves it ready for the next one, so no launch has to clear it.
// Memory order comes from an addition with release and a load with acquire, or one addition with both, by a block's
// first thread. A block barrier before and after it extends the order to the block's other threads.
//
// Data that is read after a signal must be read by plain loads, never through `const __restrict__` or load_words():
// those may return values from before the signal.
#pragma once

#include "../math.h"
#include "launch.h"

namespace bnkern {

// A barrier for all threads of `expected` blocks, which must all be resident. Exactly one block passes `first`. Each
// barrier flips the upper bit of the word and returns the other bits to zero, so the word needs no clearing.
//
// It has two halves. Loads that do not depend on other blocks belong between them: before arrive() they would delay the
// arrival, because a release waits for the loads of its thread, and after wait() nothing would hide their latency.
//
// The constructor reads the upper bit. It cannot change before this block arrives, so the arrival needs no result.
// Other work belongs between the constructor and arrive(), because the release waits for this load too.
class BlocksBarrier {
 public:
  BNKERN_DEVICE BlocksBarrier(unsigned* word, unsigned expected) : word_(word), expected_(expected) {
    if (expected_ > 1 && threadIdx.x == 0) before_ = load_relaxed(word_);
  }
  BNKERN_DEVICE void arrive(bool first) {
    __syncthreads();
    if (expected_ > 1 && threadIdx.x == 0) add_release(word_, first ? kPhase - (expected_ - 1) : 1u);
  }
  BNKERN_DEVICE void wait() const {
    if (expected_ > 1 && threadIdx.x == 0) {
      while (((before_ ^ load_acquire(word_)) & kPhase) == 0) {
      }
    }
    __syncthreads();
  }

 private:
  static constexpr unsigned kPhase = 0x80000000u;
  unsigned *word_, expected_, before_ = 0;
};

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
// A plain load, which stays among other loads in the order of the source.
BNKERN_DEVICE Pair load_pair(const Pair* p) { return two_floats<Pair>(p); }
struct Partials {
  Pair* data;
  std::int64_t channels;
  BNKERN_DEVICE Pair& at(std::int64_t part, std::int64_t channel) const { return data[part * channels + channel]; }
};

}  // namespace bnkern
