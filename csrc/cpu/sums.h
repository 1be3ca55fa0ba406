// Sums that ride in normalize, grad_sums and grad_input, where a record is wanted, and the loop of the two phases that
// write.
#pragma once

#include <utility>

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
    each([&](int r) __attribute__((always_inline)) { sums.row[r] = V::all(0); });
    return sums;
  }
  static BNKERN_INLINE Sums load(const Rows<A>& rows, std::int64_t i) {
    Sums sums;
    each([&](int r) __attribute__((always_inline)) { sums.row[r] = V::load(rows[r] + i); });
    return sums;
  }
  BNKERN_INLINE void store(const Rows<A>& rows, std::int64_t i) const {
    each([&](int r) __attribute__((always_inline)) { row[r].store(rows[r] + i); });
  }
  BNKERN_INLINE void fold(const Rows<A>& rows) const {
    A lanes[R * kLanes];
    store({lanes, kLanes}, 0);
    for (int r = 0; r < R; ++r) *rows[r] = sum<A>(V::load(lanes + r * kLanes));
  }

 private:
  // f(0), f(1), ... spelled out: an index that varies would keep row[] in memory.
  template <class F>
  static BNKERN_INLINE void each(F f) {
    [&]<int... r>(std::integer_sequence<int, r...>)
        __attribute__((always_inline)) { (f(r), ...); }(std::make_integer_sequence<int, R>{});
  }
};

// Writes the spans of a tile. Place(part, t, k, span) is one: write(i) and write_some(i, n) write 16 lanes, or n, from
// i on, and give back what they wrote; where `record`, Tally, some Sums, adds it: add(value, one).
template <class Place, class Tally, bool rows, bool record, class T>
BNKERN_INLINE void write_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                              std::int64_t group, std::int64_t tile, const Rows<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto write_span = [&](const Span& span, auto look) __attribute__((always_inline)) {
    const Place place(part, t, k, span);
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) look(i, place.write(i), kLanes);
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      look(i, place.write_some(i, n), n);
    }
  };
  const auto add = [](Tally& tally, const Packed<T>& written, int n) __attribute__((always_inline)) {
    if (n == kLanes) return tally.add(written.wide(), V::all(1));
    const auto present = first_lanes<V>(n);
    tally.add(written.wide().keep(present), V::all(1).keep(present));
  };
  if constexpr (!record) {
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
      write_span(span, [](std::int64_t, const Packed<T>&, int) __attribute__((always_inline)) {});
    });
  } else if constexpr (!rows) {
    Tally tally{Tally::zero()};
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
      write_span(span, [&](std::int64_t, const Packed<T>& written, int n)
                           __attribute__((always_inline)) { add(tally, written, n); });
    });
    tally.fold(sums);
  } else {
    const auto one = [&](const Span& span) __attribute__((always_inline)) {
      write_span(span, [&](std::int64_t i, const Packed<T>& written, int n) __attribute__((always_inline)) {
        Tally tally{Tally::load(sums, i)};
        add(tally, written, n);
        tally.store(sums, i);
      });
    };
    const auto four = [&](const Span* spans) __attribute__((always_inline)) {
      if constexpr (std::is_same_v<V, ArrayVec<A>>) {  // the same sums, with less code
        for (int r = 0; r < 4; ++r) one(spans[r]);
      } else {
        // Spelled out that they begin at one channel, so that they share the coefficients' addresses.
        const auto place = [&](Span span) __attribute__((always_inline)) {
          span.c = spans[0].c;
          return Place(part, t, k, span);
        };
        const Place r0 = place(spans[0]), r1 = place(spans[1]), r2 = place(spans[2]), r3 = place(spans[3]);
        for (std::int64_t i = 0; i < spans[0].length; i += kLanes) {
          Tally tally{Tally::load(sums, i)};
          add(tally, r0.write(i), kLanes), add(tally, r1.write(i), kLanes);
          add(tally, r2.write(i), kLanes), add(tally, r3.write(i), kLanes);
          tally.store(sums, i);
        }
      }
    };
    for_rows(part, group, tile, four, one);
  }
}

}  // namespace bnkern::BNKERN_ISA
