// Runs the tiles of the phases over threads, joins partial results in tile order, and turns them into the
// coefficients of the next phase. The order of work may differ with threads and size; no result does.
//
// Two ways to go, with the same bits:
//   by channel   a thread takes a whole channel through both phases: the second reads it from the thread's
//                own cache. Planes, where there are channels enough to keep all threads busy.
//   in step      all threads share the tiles of a batch of groups, phase by phase, the second phase from
//                the last tile to the first. Rows, whose channels lie side by side, and planes of few channels.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <type_traits>

#include "tiles.h"

namespace bnkern::BNKERN_ISA {

constexpr std::int64_t kThreadElements = 16384;  // less than this is not worth another thread
constexpr std::int64_t kStreamBytes = 24 << 20;  // results larger than this are stored past the caches
constexpr std::int64_t kJoinChannels = 32;       // rows: how many channels one thread joins at a time
constexpr std::int64_t kPlaneBytes = 256;        // shorter planes are better read in memory order
constexpr std::int64_t kBatchBytes = 8 << 20;    // what a batch of groups may hold, to be found in cache again

// One block of memory, handed out in pieces.
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

// ---- the two ways through two phases

// How many rows of numbers a phase gives, and room for their totals over all tiles.
struct Given {
  int rows = 0;
  Rows<double> totals;
};

// measure(group, tile, out, sums) gives a tile's partial result, join() adds `out` to its group's total, finish(group)
// makes the group's coefficients of it; absent where it gives no rows. apply(group, tile, sums) is the second phase,
// which may be absent as well. `sums` are of type A and a record's, shared by the tiles of a block; close(group) is
// called with the totals of the second phase's.
template <class A, class Measure, class Join, class Finish, class Apply, class Close>
void run(Partition& part, std::int64_t element_bytes, bool applying, int max_threads, const Given& measured,
         const Given& measured_sums, const Given& applied_sums, Measure measure, Join join, Finish finish, Apply apply,
         Close close) {
  const bool measuring = measured.rows > 0;
  const std::int64_t elements = part.count() * part.shape.c;
  const std::int64_t enough = 1 + elements / kThreadElements;
  const int threads = enough < max_threads ? static_cast<int>(enough) : max_threads;
  const auto total_of = [&](const Given& given, std::int64_t group) { return given.totals.at(group * part.group); };

  part.by_channel = !part.shape.rows && measuring && applying && part.groups >= threads &&
                    part.shape.s * element_bytes >= kPlaneBytes &&
                    (part.groups % threads == 0 || part.groups >= 4 * threads);
  if (part.by_channel) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t group = 0; group < part.groups; ++group) {
      double values[kMostRows], seen = 0;
      A values_of_sums[kMostRows];
      const Rows<double> out{values, 1};
      const Rows<A> sums{values_of_sums, 1};
      for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
        measure(group, tile, out, sums);
        const double count = static_cast<double>(tile_count(part, tile));
        join(1, seen, total_of(measured, group), count, out);
        join_sums(measured_sums.rows, 1, total_of(measured_sums, group), sums);
        seen += count;
      }
      finish(group);
      for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
        apply(group, tile, sums);
        join_sums(applied_sums.rows, 1, total_of(applied_sums, group), sums);
      }
      close(group);
    }
    return;
  }

  // Batches of groups that fit a cache, unless all is small anyway.
  std::int64_t batch = part.groups;
  if (part.shape.rows && measuring && applying && elements * element_bytes > kStreamBytes) {
    const std::int64_t group_bytes = part.count() * part.group * element_bytes;
    batch = kBatchBytes / group_bytes < 1 ? 1 : kBatchBytes / group_bytes;
    batch = batch < part.groups ? batch : part.groups;
  }
  // Partial results lie tile by tile, row by row, groups side by side; a record's sums block by block.
  const std::int64_t pitch = batch * part.group;
  const std::int64_t block = measured_sums.rows || applied_sums.rows ? part.tiles_per_block : 1;
  const std::int64_t blocks = divide_up(part.tiles, block);
  const std::int64_t pieces = divide_up(part.group, kJoinChannels);
  const int sums_rows = std::max(measured_sums.rows, applied_sums.rows);  // one phase after the other
  Workspace space(Workspace::bytes<double>(measured.rows * pitch * part.tiles) +
                  Workspace::bytes<A>(sums_rows * pitch * blocks));
  double* const parts = space.take<double>(measured.rows * pitch * part.tiles);
  A* const parts_of_sums = space.take<A>(sums_rows * pitch * blocks);
  const auto part_of = [&](std::int64_t tile, std::int64_t group) {
    return Rows<double>{parts + tile * measured.rows * pitch + group * part.group, pitch};
  };
  const auto sums_of = [&](const Given& given, std::int64_t index, std::int64_t group) {
    return Rows<A>{parts_of_sums + index * given.rows * pitch + group * part.group, pitch};
  };

  const auto work = [&] {
    for (std::int64_t from = 0; from < part.groups; from += batch) {
      const std::int64_t groups = part.groups - from < batch ? part.groups - from : batch;
      const auto channels_of = [&](std::int64_t group) {
        const std::int64_t left = part.width - (from + group) * part.group;
        return left < part.group ? left : part.group;
      };
      const auto cleared_sums = [&](const Given& given, std::int64_t index, std::int64_t group) {
        const Rows<A> sums = sums_of(given, index, group);
        for (int r = 0; r < given.rows; ++r) std::memset(sums[r], 0, channels_of(group) * sizeof(A));
        return sums;
      };
      const auto join_blocks = [&](const Given& given, std::int64_t group) {
        for (std::int64_t index = 0; given.rows && index < blocks; ++index)
          join_sums(given.rows, channels_of(group), total_of(given, from + group), sums_of(given, index, group));
      };
      if (measuring) {
#pragma omp for schedule(static)
        for (std::int64_t unit = 0; unit < groups * blocks; ++unit) {
          const std::int64_t index = unit / groups, group = unit % groups;
          const Rows<A> sums = cleared_sums(measured_sums, index, group);
          const std::int64_t end = std::min((index + 1) * block, part.tiles);
          for (std::int64_t tile = index * block; tile < end; ++tile)
            measure(from + group, tile, part_of(tile, group), sums);
        }
        // Channels are joined apart, since rows have few groups: the threads share those of one.
#pragma omp for schedule(static)
        for (std::int64_t unit = 0; unit < groups * pieces; ++unit) {
          const std::int64_t group = unit / pieces, first = unit % pieces * kJoinChannels;
          double seen = 0;
          for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
            const double count = static_cast<double>(tile_count(part, tile));
            const std::int64_t channels = std::min(tile_channels(part, from + group, tile) - first, kJoinChannels);
            if (channels > 0)
              join(channels, seen, total_of(measured, from + group).at(first), count, part_of(tile, group).at(first));
            seen += count;
          }
        }
#pragma omp for schedule(static)
        for (std::int64_t group = 0; group < groups; ++group) {
          join_blocks(measured_sums, group);
          finish(from + group);
        }
      }
      if (applying) {
#pragma omp for schedule(static)
        for (std::int64_t unit = 0; unit < groups * blocks; ++unit) {
          // After measuring, the last tiles first: they are still in cache. Within a tile memory order is kept.
          const std::int64_t index = measuring ? blocks - 1 - unit / groups : unit / groups, group = unit % groups;
          const Rows<A> sums = cleared_sums(applied_sums, index, group);
          const std::int64_t end = std::min((index + 1) * block, part.tiles);
          for (std::int64_t tile = end - 1; tile >= index * block; --tile) apply(from + group, tile, sums);
        }
      }
      if (applied_sums.rows) {
#pragma omp for schedule(static)
        for (std::int64_t group = 0; group < groups; ++group) {
          join_blocks(applied_sums, group);
          close(from + group);
        }
      }
    }
  };
  // A thread alone needs no team: each of a team's barriers is a system call, even where nobody waits.
  if (threads == 1 && !omp_in_parallel()) return work();
#pragma omp parallel num_threads(threads)
  work();
}

// ---- from wide channels to channels

// The wide channels that hold values of one channel: first, first + step, ... below end.
struct Columns {
  std::int64_t first, end, step;
};

// Calls f(channel, columns) for the real channels of a group.
template <class F>
void for_channels(const Partition& part, std::int64_t group, F f) {
  const std::int64_t c0 = group * part.group;
  const std::int64_t c1 = c0 + part.group < part.width ? c0 + part.group : part.width;
  const bool wide = part.width != part.shape.c;  // then there is one group
  for (std::int64_t c = c0; c < (wide ? part.shape.c : c1); ++c)
    f(c, Columns{c, wide ? part.width : c + 1, part.shape.c});
}

template <class A>
void set_all(A* array, const Columns& columns, A value) {
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) array[v] = value;
}

// Row after row of a record [rows, C], for channel c.
inline void write_record(double* record, std::int64_t channels, std::int64_t c, std::initializer_list<double> rows) {
  for (const double value : rows) {
    record[c] = value;
    record += channels;
  }
}

// The sum of one row over the wide channels of a channel.
inline double add_up(const double* row, const Columns& columns) {
  double sum = 0;
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) sum += row[v];
  return sum;
}

inline Given make_room(Workspace& space, int rows, std::int64_t width) {
  const Given given{rows, Rows<double>{space.take<double>(rows * width), width}};
  std::memset(given.totals.data, 0, rows * width * sizeof(double));
  return given;
}

inline bool gapless(const View& view, const Shape& shape) { return !view || view.outer == shape.c; }

}  // namespace bnkern::BNKERN_ISA
