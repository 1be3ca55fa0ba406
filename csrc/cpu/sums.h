// The sums that normalize, grad_sums and grad_input compute beside their results if the call has a record, and the loop
// of the two phases that write a tensor.
#pragma once

#include <utility>

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

// Without vector instructions (vectors are arrays) a record is computed in a second pass over the tile, which is still
// in cache, and f is called instead of inlined. To inline 16 scalar lanes would multiply the size of the code. The
// order of additions is the same.
template <class F>
__attribute__((noinline)) void call_not_inlined(F f) {
  f();
}
template <class A, class F>
BNKERN_INLINE void compactly(F f) {
  if constexpr (kArrayVec<A>)
    call_not_inlined(f);
  else
    f();
}

// R sums for each lane. Planes keep them in registers for the whole tile. Rows keep them in memory, one per channel,
// and load those of 16 channels at a time. Counts are exact, because a lane adds far fewer than 2^24 values.
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
  // Calls f(0), f(1), ... without a loop, because a variable index would keep row[] in memory.
  template <class F>
  static BNKERN_INLINE void each(F f) {
    [&]<int... r>(std::integer_sequence<int, r...>)
        __attribute__((always_inline)) { (f(r), ...); }(std::make_integer_sequence<int, R>{});
  }
};

// Adds up a tile vector by vector. visit(span) returns the function that adds the n lanes from i on: add(tally, i, n).
template <class Tally, bool rows, class A, class Visit>
BNKERN_INLINE void second_look(const Partition& part, std::int64_t group, std::int64_t tile, const Rows<A>& sums,
                               Visit visit) {
  Tally tally{Tally::zero()};
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    const auto add = visit(span);
    for (std::int64_t i = 0; i < span.length; i += kLanes) {
      if constexpr (rows) tally = Tally{Tally::load(sums, i)};
      add(tally, i, static_cast<int>(span.length - i < kLanes ? span.length - i : kLanes));
      if constexpr (rows) tally.store(sums, i);
    }
  });
  if constexpr (!rows) tally.fold(sums);
}

// Adds up the values of a tile that were written to `view`.
template <class T, class Tally>
void second_look_at(const Partition& part, const View& view, std::int64_t group, std::int64_t tile,
                    const Rows<Accumulator<T>>& sums) {
  using V = Vec<Accumulator<T>>;
  const auto visit = [&](const Span& span) {
    const T* const p = at<const T>(part, view, span);
    return [p](Tally& tally, std::int64_t i, int n)
               __attribute__((always_inline)) { tally.add(load_some(p + i, n), V::all(1).keep(first_lanes<V>(n))); };
  };
  part.shape.rows ? second_look<Tally, true>(part, group, tile, sums, visit)
                  : second_look<Tally, false>(part, group, tile, sums, visit);
}

template <class A>
struct NonfiniteCount : Sums<A, 1> {
  BNKERN_INLINE void add(Vec<A> value, Vec<A> one) { this->row[0] = this->row[0].plus_where_nonfinite(value, one); }
};

// Adds the numbers of values of a tile that are infinite or NaN to `counts`, one for each channel of the tile. It reads
// the tile again, so call it only if a sum shows that there are such values.
template <class T>
__attribute__((noinline)) void add_nonfinite(const Partition& part, const View& view, std::int64_t group,
                                             std::int64_t tile, double* counts) {
  using A = Accumulator<T>;
  const std::int64_t channels = tile_channels(part, group, tile);
  A* const found = zeroed_scratch<A>((channels + kLanes - 1) / kLanes * kLanes);
  second_look_at<T, NonfiniteCount<A>>(part, view, group, tile, Rows<A>{found, 0});
  for (std::int64_t c = 0; c < channels; ++c) counts[c] += found[c];
}

// Writes the spans of a tile. Place(part, t, k, span) is one span. Its write(i) and write_some(i, n) write 16 or n
// lanes, from i on, to `written`, and return them. With `record` they are added to Tally, which is a kind of Sums, by
// add(value, one).
template <class Place, class Tally, bool rows, bool record, class T>
BNKERN_INLINE void write_tile(const Partition& part, const Tensors<T>& t, const Coefficients<Accumulator<T>>& k,
                              const View& written, std::int64_t group, std::int64_t tile,
                              const Rows<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto write_span = [&](const Span& span, auto visit) __attribute__((always_inline)) {
    const Place place(part, t, k, span);
    std::int64_t i = 0;
    for (; i + kLanes <= span.length; i += kLanes) visit(i, place.write(i), kLanes);
    if (i < span.length) {
      const int n = static_cast<int>(span.length - i);
      visit(i, place.write_some(i, n), n);
    }
  };
  const auto add = [](Tally& tally, const Packed<T>& written, int n) __attribute__((always_inline)) {
    if (n == kLanes) return tally.add(written.wide(), V::all(1));
    const auto present = first_lanes<V>(n);
    tally.add(written.wide().keep(present), V::all(1).keep(present));
  };
  const auto ignore = [](std::int64_t, const Packed<T>&, int) __attribute__((always_inline)) {};
  if constexpr (!record) {
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) { write_span(span, ignore); });
  } else if constexpr (!rows) {
    Tally tally{Tally::zero()};
    for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
      write_span(span, [&](std::int64_t, const Packed<T>& written, int n)
                           __attribute__((always_inline)) { add(tally, written, n); });
    });
    tally.fold(sums);
  } else {
    const auto write_row = [&](const Span& span) __attribute__((always_inline)) {
      write_span(span, [&](std::int64_t i, const Packed<T>& written, int n) __attribute__((always_inline)) {
        Tally tally{Tally::load(sums, i)};
        add(tally, written, n);
        tally.store(sums, i);
      });
    };
    // Writes rows as without a record, and adds them up in a second pass, while they are in the first-level cache. This
    // needs far fewer registers than to write and add four rows at once. Values that are stored past the caches are
    // added when they are written.
    const auto write_four_rows = [&](const Span* spans) __attribute__((always_inline)) {
      if (t.stream) {
        for (int r = 0; r < 4; ++r) write_row(spans[r]);
        return;
      }
#pragma GCC unroll 1
      for (int r = 0; r < 4; ++r) write_span(spans[r], ignore);
      const T *const r0 = at<const T>(part, written, spans[0]), *const r1 = at<const T>(part, written, spans[1]),
                     *const r2 = at<const T>(part, written, spans[2]), *const r3 = at<const T>(part, written, spans[3]);
      for (std::int64_t i = 0; i < spans[0].length; i += kLanes) {
        Tally tally{Tally::load(sums, i)};
        tally.add(load(r0 + i), V::all(1)), tally.add(load(r1 + i), V::all(1));
        tally.add(load(r2 + i), V::all(1)), tally.add(load(r3 + i), V::all(1));
        tally.store(sums, i);
      }
    };
    for_rows(part, group, tile, write_four_rows, write_row);
  }
}

}  // namespace bnkern::BNKERN_ISA
