// Sums that ride in normalize, grad_sums and grad_input, where a record is wanted.
#pragma once

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

// R sums by lane. A plane keeps them in registers for the whole tile; rows keep them in memory, beside the channels
// (row r of channel c at p[r * pitch + c]), and load 16 channels' at a time. Counts are exact: a tile is smaller
// than 2^24.
template <class A, int R>
struct Sums {
  using V = Vec<A>;
  V row[R];

  static BNKERN_INLINE Sums zero() {
    Sums sums;
    for (int r = 0; r < R; ++r) sums.row[r] = V::all(0);
    return sums;
  }
  static BNKERN_INLINE Sums load(const A* p, std::int64_t pitch) {
    Sums sums;
    for (int r = 0; r < R; ++r) sums.row[r] = V::load(p + r * pitch);
    return sums;
  }
  BNKERN_INLINE void store(A* p, std::int64_t pitch) const {
    for (int r = 0; r < R; ++r) row[r].store(p + r * pitch);
  }
  // |d| and its sign, to the four rows from r on, of the lanes where `one` is 1; d is 0 in the others.
  BNKERN_INLINE void add_sizes(int r, V d, V one) {
    row[r + kAbsSum] = row[r + kAbsSum] + d.magnitude();
    row[r + kPositive] = row[r + kPositive].plus_where(d.positive(), one);
    row[r + kNegative] = row[r + kNegative].plus_where(d.negative(), one);
    row[r + kZero] = row[r + kZero].plus_where(d.zero(), one);
  }
  BNKERN_INLINE void give(Rows out) const {
    for (int r = 0; r < R; ++r) *out[r] = sum<A>(row[r]);
  }
};

// The rows' sums, given as doubles.
template <class A>
BNKERN_INLINE void give(const A* p, std::int64_t pitch, int rows, std::int64_t channels, Rows out) {
  for (int r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < channels; ++c) out[r][c] = p[r * pitch + c];
}

// The channels of a tile, rounded up to whole vectors.
BNKERN_INLINE std::int64_t vector_channels(std::int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

}  // namespace bnkern::BNKERN_ISA
