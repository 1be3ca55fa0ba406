// Distributes the tiles of the phases over threads, and joins partial results in tile order. The coefficients of the
// next phase are computed from them. The order of work may depend on the number of threads and on the size. The results
// do not.
//
// There are two schedules, with the same bits:
//   by channel   A thread computes both phases of a whole channel. The second phase reads the channel from the thread's
//                own cache. This is for planes with enough channels to keep all threads busy.
//   in step      All threads share the tiles of a batch of groups, first in one phase and then in the other. The second
//                phase runs from the last tile to the first. This is for rows, whose channels are adjacent in memory,
//                and for planes with few channels.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <type_traits>

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

constexpr std::int64_t kThreadElements = 16384;  // the least number of elements for one more thread
constexpr std::int64_t kStreamBytes = 24 << 20;  // larger results are stored past the caches
constexpr std::int64_t kJoinChannels = 32;       // rows: the number of channels that one thread joins at a time
constexpr std::int64_t kPlaneBytes = 256;        // shorter planes are read faster in memory order
constexpr std::int64_t kBatchBytes = 8 << 20;    // the largest batch of groups that stays in cache between the phases

// One block of memory. take() returns consecutive pieces of it.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes)
      : data_(static_cast<char*>(std::aligned_alloc(64, divide_up(bytes, 64) * 64))) {}
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  template <class A>
  A* take(std::int64_t count) {
    A* const piece = reinterpret_cast<A*>(data_ + used_);
    used_ += bytes<A>(count);
    return piece;
  }
  template <class A>
  static std::int64_t bytes(std::int64_t count) {
    return divide_up(count * static_cast<std::int64_t>(sizeof(A)), 64) * 64;
  }

 private:
  char* data_;
  std::int64_t used_ = 0;
};

// ---- per-channel vectors of any dtype

template <class A>
A read(const ChannelVector& vector, std::int64_t c, A absent) {
  if (!vector) return absent;
  A value = absent;
  with_dtype(vector.dtype, [&](auto* t) {
    value = static_cast<A>(widen(static_cast<std::remove_pointer_t<decltype(t)>*>(vector.data)[c]));
  });
  return value;
}

template <class A>
void write(const ChannelVector& vector, std::int64_t c, A value) {
  with_dtype(vector.dtype, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    narrow(static_cast<Accumulator<T>>(value), static_cast<T*>(vector.data) + c);
  });
}

// ---- partial results

template <class D>
void join_sums(int rows, std::int64_t channels, const Rows<double>& total, const Rows<D>& part) {
  for (int r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < channels; ++c) total[r][c] += part[r][c];
}

// ---- the two schedules of two phases

// The sums over all tiles that a phase computes for each channel. There are `rows` of them, possibly none.
struct Totals {
  int rows = 0;
  Rows<double> values;
};

// The base class of a call of two phases, for run(). `measure` computes the partial result of a tile. `apply` is the
// second phase, and its coefficients are computed from the totals. Either phase may be absent. A tile also adds to the
// sums of a record, which have type A and are shared by the tiles of a block.
//
//   void measure(group, tile, Rows<double> out, Rows<A> sums)   a tile's partial result, and its part of a record
//   void join(channels, before, total, count, tile)             adds the result of a tile of `count` values per channel
//                                                               to the total of the previous tiles, of `before` values
//   void finish(group)                                          computes the group's coefficients from its totals
//   void apply(group, tile, Rows<A> sums)                       the second phase
//   void close(group)                                           runs after it, with the totals of its sums
template <class T>
struct Phases {
  using A = Accumulator<T>;
  Partition part;
  std::int64_t element_bytes;  // read and written by both phases, per element
  bool applying;
  int max_threads;
  Totals measured, measured_sums, applied_sums;

  bool measuring() const { return measured.rows > 0; }
  std::int64_t elements() const { return part.count() * part.shape.c; }
  Rows<double> total_of(const Totals& totals, std::int64_t group) const { return totals.values.at(group * part.group); }
};

// Each thread computes both phases of whole channels.
template <class P>
void run_by_channel(P& phases, int threads) {
  using A = typename P::A;
  const Partition& part = phases.part;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (std::int64_t group = 0; group < part.groups; ++group) {
    double values[kMostRows], before = 0;
    A values_of_sums[kMostRows];
    const Rows<double> out{values, 1};
    const Rows<A> sums{values_of_sums, 1};
    const auto add_sums = [&](const Totals& totals) {
      join_sums(totals.rows, 1, phases.total_of(totals, group), sums);
    };
    for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
      phases.measure(group, tile, out, sums);
      const double count = static_cast<double>(tile_count(part, tile));
      phases.join(1, before, phases.total_of(phases.measured, group), count, out);
      add_sums(phases.measured_sums);
      before += count;
    }
    phases.finish(group);
    for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
      phases.apply(group, tile, sums);
      add_sums(phases.applied_sums);
    }
    phases.close(group);
  }
}

// All threads share the tiles of a batch of groups, phase by phase. Each member function that ends in _all is called
// by every thread of the team, and divides its loop among them.
template <class P>
class InStep {
 public:
  using A = typename P::A;

  explicit InStep(P& phases)
      : phases_(phases),
        part_(phases.part),
        batch_(batch_of(phases)),
        pitch_(batch_ * part_.group),
        block_(phases.measured_sums.rows || phases.applied_sums.rows ? part_.tiles_per_block : 1),
        blocks_(divide_up(part_.tiles, block_)),
        sums_rows_(std::max(phases.measured_sums.rows, phases.applied_sums.rows)),  // the phases reuse the memory
        space_(Workspace::bytes<double>(phases.measured.rows * pitch_ * part_.tiles) +
               Workspace::bytes<A>(sums_rows_ * pitch_ * blocks_)),
        parts_(space_.template take<double>(phases.measured.rows * pitch_ * part_.tiles)),
        parts_of_sums_(space_.template take<A>(sums_rows_ * pitch_ * blocks_)) {}

  void run_all() {
    for (std::int64_t from = 0; from < part_.groups; from += batch_) {
      const std::int64_t groups = std::min(part_.groups - from, batch_);
      if (phases_.measuring()) {
        measure_all(from, groups);
        join_all(from, groups);
        finish_all(from, groups);
      }
      if (phases_.applying) apply_all(from, groups);
      if (phases_.applied_sums.rows) close_all(from, groups);
    }
  }

 private:
  // The number of groups in a batch. A batch fits into a cache, or has all groups if the tensors are small.
  static std::int64_t batch_of(const P& phases) {
    const Partition& part = phases.part;
    const bool two_phases = phases.measuring() && phases.applying;
    if (!part.shape.rows || !two_phases || phases.elements() * phases.element_bytes <= kStreamBytes) return part.groups;
    const std::int64_t group_bytes = part.count() * part.group * phases.element_bytes;
    return std::min(std::max<std::int64_t>(kBatchBytes / group_bytes, 1), part.groups);
  }

  // Partial results are stored as [tile][row][group][channel], and the sums of a record as
  // [block][row][group][channel].
  Rows<double> part_of(std::int64_t tile, std::int64_t group) const {
    return {parts_ + tile * phases_.measured.rows * pitch_ + group * part_.group, pitch_};
  }
  Rows<A> sums_of(const Totals& totals, std::int64_t index, std::int64_t group) const {
    return {parts_of_sums_ + index * totals.rows * pitch_ + group * part_.group, pitch_};
  }
  std::int64_t channels_of(std::int64_t group) const {
    return std::min(part_.width - group * part_.group, part_.group);
  }
  Rows<A> cleared_sums(const Totals& totals, std::int64_t index, std::int64_t from, std::int64_t group) const {
    const Rows<A> sums = sums_of(totals, index, group);
    for (int r = 0; r < totals.rows; ++r) std::memset(sums[r], 0, channels_of(from + group) * sizeof(A));
    return sums;
  }
  void join_blocks(const Totals& totals, std::int64_t from, std::int64_t group) const {
    for (std::int64_t index = 0; totals.rows && index < blocks_; ++index)
      join_sums(totals.rows, channels_of(from + group), phases_.total_of(totals, from + group),
                sums_of(totals, index, group));
  }

  void measure_all(std::int64_t from, std::int64_t groups) {
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < groups * blocks_; ++unit) {
      const std::int64_t index = unit / groups, group = unit % groups;
      const Rows<A> sums = cleared_sums(phases_.measured_sums, index, from, group);
      const std::int64_t end = std::min((index + 1) * block_, part_.tiles);
      for (std::int64_t tile = index * block_; tile < end; ++tile)
        phases_.measure(from + group, tile, part_of(tile, group), sums);
    }
  }

  // Rows have few groups, so threads share the channels of a group.
  void join_all(std::int64_t from, std::int64_t groups) {
    const std::int64_t pieces = divide_up(part_.group, kJoinChannels);
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < groups * pieces; ++unit) {
      const std::int64_t group = unit / pieces, first = unit % pieces * kJoinChannels;
      double before = 0;
      for (std::int64_t tile = 0; tile < part_.tiles; ++tile) {
        const double count = static_cast<double>(tile_count(part_, tile));
        const std::int64_t channels = std::min(tile_channels(part_, from + group, tile) - first, kJoinChannels);
        if (channels > 0)
          phases_.join(channels, before, phases_.total_of(phases_.measured, from + group).at(first), count,
                       part_of(tile, group).at(first));
        before += count;
      }
    }
  }

  void finish_all(std::int64_t from, std::int64_t groups) {
#pragma omp for schedule(static)
    for (std::int64_t group = 0; group < groups; ++group) {
      join_blocks(phases_.measured_sums, from, group);
      phases_.finish(from + group);
    }
  }

  void apply_all(std::int64_t from, std::int64_t groups) {
    const bool measured = phases_.measuring();
#pragma omp for schedule(static)
    for (std::int64_t unit = 0; unit < groups * blocks_; ++unit) {
      // After measure_all the last tiles come first, because they are still in cache. Within a tile the order is that
      // of memory.
      const std::int64_t index = measured ? blocks_ - 1 - unit / groups : unit / groups, group = unit % groups;
      const Rows<A> sums = cleared_sums(phases_.applied_sums, index, from, group);
      const std::int64_t end = std::min((index + 1) * block_, part_.tiles);
      for (std::int64_t tile = end - 1; tile >= index * block_; --tile) phases_.apply(from + group, tile, sums);
    }
  }

  void close_all(std::int64_t from, std::int64_t groups) {
#pragma omp for schedule(static)
    for (std::int64_t group = 0; group < groups; ++group) {
      join_blocks(phases_.applied_sums, from, group);
      phases_.close(from + group);
    }
  }

  P& phases_;
  const Partition& part_;
  const std::int64_t batch_, pitch_, block_, blocks_;
  const int sums_rows_;
  Workspace space_;
  double* const parts_;
  A* const parts_of_sums_;
};

// Runs both phases over all tiles.
template <class P>
void run(P& phases) {
  Partition& part = phases.part;
  const std::int64_t useful_threads = 1 + phases.elements() / kThreadElements;
  const int threads = useful_threads < phases.max_threads ? static_cast<int>(useful_threads) : phases.max_threads;
  part.by_channel = !part.shape.rows && phases.measuring() && phases.applying && part.groups >= threads &&
                    part.shape.s * phases.element_bytes >= kPlaneBytes &&
                    (part.groups % threads == 0 || part.groups >= 4 * threads);
  if (part.by_channel) return run_by_channel(phases, threads);
  InStep<P> in_step(phases);
  // A single thread runs without an OpenMP team. Every barrier of a team is a system call, even if no thread waits.
  if (threads == 1 && !omp_in_parallel()) return in_step.run_all();
#pragma omp parallel num_threads(threads)
  in_step.run_all();
}

// ---- from wide channels to channels

// The wide channels with values of one channel: first, first + step, ... below end.
struct Columns {
  std::int64_t first, end, step;
};

// Calls f(channel, columns) for the real channels of a group.
template <class F>
void for_channels(const Partition& part, std::int64_t group, F f) {
  const std::int64_t c0 = group * part.group;
  const std::int64_t c1 = c0 + part.group < part.width ? c0 + part.group : part.width;
  const bool wide = part.width != part.shape.c;  // if true, there is one group
  for (std::int64_t c = c0; c < (wide ? part.shape.c : c1); ++c)
    f(c, Columns{c, wide ? part.width : c + 1, part.shape.c});
}

template <class A>
void set_all(A* array, const Columns& columns, A value) {
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) array[v] = value;
}

// Writes all rows of a record [rows, C] for channel c.
inline void write_record(double* record, std::int64_t channels, std::int64_t c, std::initializer_list<double> rows) {
  for (const double value : rows) {
    record[c] = value;
    record += channels;
  }
}

// The sum of one row of totals over the wide channels of a channel.
inline double add_up(const double* row, const Columns& columns) {
  double sum = 0;
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) sum += row[v];
  return sum;
}

inline Totals make_totals(Workspace& space, int rows, std::int64_t width) {
  const Totals totals{rows, Rows<double>{space.take<double>(rows * width), width}};
  std::memset(totals.values.data, 0, rows * width * sizeof(double));
  return totals;
}

inline bool gapless(const View& view, const Shape& shape) { return !view || view.outer == shape.c; }

}  // namespace bnkern::BNKERN_ISA
