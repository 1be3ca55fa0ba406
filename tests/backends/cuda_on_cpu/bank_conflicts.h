// Counts the bank conflicts of a warp's loads of 8 bytes from shared memory.
#pragma once

#include <vector>

namespace cuda_on_cpu {

// Shared memory has 32 banks of 4 bytes. It serves 16 lanes of such a load at a time, and needs one pass more for every
// further word in the same bank that these lanes read.
class BankConflicts {
 public:
  // Whether the loads of the following launches are counted.
  static bool counted();
  // Adds the loads of a warp. lanes[i] has the offsets of lane i in the order of its loads. All lanes have as many.
  static void add(const std::vector<const std::vector<unsigned>*>& lanes);
};

}  // namespace cuda_on_cpu
