// Sums that ride in normalize, grad_sums and grad_input, where a record is wanted.
#pragma once

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

// Runs f, which adds 16 lanes to sums: in place, or, where a vector is an array, by a call. Unrolled in place it would
// there be a hundred times the code, for no speed.
template <class F>
__attribute__((noinline)) void called(F f) {
  f();
}
template <class A, class F>
BNKERN_INLINE void compactly(F f) {
  if constexpr (std::is_same_v<Vec<A>, ArrayVec<A>>)
    called(f);
  else
    f();
}

// R sums by lane. A plane keeps them in registers for the whole tile; rows keep them in memory, beside the channels,
// and load 16 channels' at a time. Counts are exact: far fewer than 2^24 values meet in a lane.
template <class A, int R>
struct Sums {
  using V = Vec<A>;
  V row[R];

  static BNKERN_INLINE Sums zero() {
    Sums sums;
    for (int r = 0; r < R; ++r) sums.row[r] = V::all(0);
    return sums;
  }
  static BNKERN_INLINE Sums load(const Rows<A>& rows, std::int64_t i) {
    Sums sums;
    for (int r = 0; r < R; ++r) sums.row[r] = V::load(rows[r] + i);
    return sums;
  }
  BNKERN_INLINE void store(const Rows<A>& rows, std::int64_t i) const {
    for (int r = 0; r < R; ++r) row[r].store(rows[r] + i);
  }
  BNKERN_INLINE void fold(const Rows<A>& rows) const {
    for (int r = 0; r < R; ++r) *rows[r] = sum<A>(row[r]);
  }
  // |d| and its sign, to the four rows from r on, of the lanes where `one` is 1; d is 0 in the others.
  BNKERN_INLINE void add_sizes(int r, V d, V one) {
    compactly<A>([&]() __attribute__((always_inline)) {
      row[r + kAbsSum] = row[r + kAbsSum] + d.magnitude();
      row[r + kPositive] = row[r + kPositive].plus_where(d.positive(), one);
      row[r + kNegative] = row[r + kNegative].plus_where(d.negative(), one);
      row[r + kZero] = row[r + kZero].plus_where(d.zero(), one);
    });
  }
};

}  // namespace bnkern::BNKERN_ISA
