// Runs the tiles of the phases over threads, joins partial results in tile order, and turns them into the
// coefficients of the next phase. The order of work may differ with threads and size; no result does.
//
// Two ways to go, with the same bits:
//   by channel   a thread takes a whole channel through both phases: the second reads it from the thread's
//                own cache. Planes, where there are channels enough to keep all threads busy.
//   in step      all threads share the tiles of a batch of groups, phase by phase, the second phase from
//                the last tile to the first. Rows, whose channels lie side by side, and planes of few channels.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <type_traits>

#include "cpu.h"
#include "tiles.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kThreadElements = 16384;  // less than this is not worth another thread
constexpr std::int64_t kStreamBytes = 24 << 20;  // results larger than this are stored past the caches
constexpr std::int64_t kRowTiles = 512;          // rows: about as many tiles as there should be at most
constexpr std::int64_t kBlockRows = 512;         // rows: at most so many under one of a record's sums
constexpr std::int64_t kBlocks = 16;             // rows: about as few blocks as there should be at least
constexpr std::int64_t kJoinChannels = 32;       // rows: how many channels one thread joins at a time
constexpr std::int64_t kPlaneBytes = 256;        // shorter planes are better read in memory order
constexpr std::int64_t kBatchBytes = 8 << 20;    // what a batch of groups may hold, to be found in cache again

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::int64_t kActiveRow = 7;  // of a record; the others are written from the first on

// The smallest factor that makes c a multiple of 16.
std::int64_t factor_to_16(std::int64_t c) {
  std::int64_t factor = kLanes;
  for (; factor > 1 && c % 2 == 0; c /= 2) factor /= 2;
  return factor;
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

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

// Joins a tile's (mean, M2) to those of the tiles before it.
void join_moments(std::int64_t channels, double before, const Rows<double>& total, double count,
                  const Rows<double>& tile) {
  if (before == 0) {
    std::memcpy(total[kMean], tile[kMean], channels * sizeof(double));
    std::memcpy(total[kM2], tile[kM2], channels * sizeof(double));
    return;
  }
  // chan_merge with its ratio of counts, the same for all channels, taken out of the loop.
  const double share = count / (before + count), weight = before * share;
  for (std::int64_t c = 0; c < channels; ++c) {
    chan_join(&total[kMean][c], &total[kM2][c], tile[kMean][c], tile[kM2][c], share, weight);
  }
}

// The rows that a record has besides, before join_moments() changes mean and M2.
void join_higher(std::int64_t channels, double before, const Rows<double>& total, double count,
                 const Rows<double>& tile) {
  if (before == 0) {
    for (const int r : {kM3, kM4, kMin, kMax}) std::memcpy(total[r], tile[r], channels * sizeof(double));
    return;
  }
  const double *const mean = total[kMean], *const m2 = total[kM2];
  const double *const tile_mean = tile[kMean], *const tile_m2 = tile[kM2];
  const double *const tile_m3 = tile[kM3], *const tile_m4 = tile[kM4];
  double *const m3 = total[kM3], *const m4 = total[kM4];
#pragma GCC ivdep
  for (std::int64_t c = 0; c < channels; ++c) {
    const HigherMoments<double> both =
        pebay_merge(Moments<double>{before, mean[c], m2[c]}, HigherMoments<double>{m3[c], m4[c]},
                    Moments<double>{count, tile_mean[c], tile_m2[c]}, HigherMoments<double>{tile_m3[c], tile_m4[c]});
    m3[c] = both.m3, m4[c] = both.m4;
  }
  for (std::int64_t c = 0; c < channels; ++c) total[kMin][c] = least(tile[kMin][c], total[kMin][c]);
  for (std::int64_t c = 0; c < channels; ++c) total[kMax][c] = largest(tile[kMax][c], total[kMax][c]);
}

template <class D>
void join_sums(int rows, std::int64_t channels, const Rows<double>& total, const Rows<D>& part) {
  for (int r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < channels; ++c) total[r][c] += part[r][c];
}

// How many values wide channel v saw.
double values_of(const Partition& part, std::int64_t v) {
  if (!part.shape.rows) return static_cast<double>(part.count());
  return static_cast<double>(part.rows + (v < part.leftover));
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
void write_record(double* record, std::int64_t channels, std::int64_t c, std::initializer_list<double> rows) {
  for (const double value : rows) {
    record[c] = value;
    record += channels;
  }
}

// The sum of one row over the wide channels of a channel.
double add_up(const double* row, const Columns& columns) {
  double sum = 0;
  for (std::int64_t v = columns.first; v < columns.end; v += columns.step) sum += row[v];
  return sum;
}

Given make_room(Workspace& space, int rows, std::int64_t width) {
  const Given given{rows, Rows<double>{space.take<double>(rows * width), width}};
  std::memset(given.totals.data, 0, rows * width * sizeof(double));
  return given;
}

bool gapless(const View& view, const Shape& shape) { return !view || view.outer == shape.c; }

template <class T>
void forward_as(const Forward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.x, p.shape) && gapless(p.residual, p.shape) && gapless(p.y, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;

  // A record's moments ride in the phase moments; where that does not run they are taken of a tile right before it is
  // normalised, which then counts as measuring.
  const bool record = p.record != nullptr, as_one = record && !p.moments;
  Workspace space(4 * Workspace::bytes<A>(part.width) + 3 * Workspace::bytes<double>(kMostRows * part.width));
  Coefficients<A> k{};
  k.mean = space.take<A>(part.width);
  k.invstd = space.take<A>(part.width);
  k.weight = space.take<A>(part.width);
  k.bias = space.take<A>(part.width);
  const Given measured = make_room(space, record ? kRecordedMomentsRows : p.moments ? kMomentsRows : 0, part.width);
  const Given measured_sums = make_room(space, as_one ? kRecordedNormalizeRows : 0, part.width);
  const Given applied_sums = make_room(space, record && !as_one ? kRecordedNormalizeRows : 0, part.width);

  Tensors<T> t{};
  t.x = p.x, t.residual = p.residual, t.y = p.y, t.mask = p.mask, t.relu = p.relu;
  t.stream = elements * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;

  if (p.counter && p.moments) ++*p.counter;
  const double momentum = p.cumulative && p.counter ? 1.0 / static_cast<double>(*p.counter) : p.momentum;
  A* const means = static_cast<A*>(p.mean);
  A* const spreads = static_cast<A*>(p.spread);

  const auto coefficients = [&](std::int64_t c, const Columns& columns) {
    set_all(k.mean, columns, means ? means[c] : A(0));
    set_all(k.invstd, columns, spreads ? spreads[c] : A(1));
    set_all(k.weight, columns, read(p.weight, c, A(1)));
    set_all(k.bias, columns, read(p.bias, c, A(0)));
  };
  const auto record_active = [&](std::int64_t group, const Given& sums) {
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      p.record[kActiveRow * p.shape.c + c] = add_up(sums.totals[kActive], columns);
    });
  };
  const auto finish = [&](std::int64_t group) {
    const Rows<double>& totals = measured.totals;
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      Moments<double> all{0, 0, 0};
      HigherMoments<double> higher{0, 0};
      double low = kInfinity, high = -kInfinity;
      for (std::int64_t v = columns.first; v < columns.end; v += columns.step) {
        const Moments<double> some{values_of(part, v), totals[kMean][v], totals[kM2][v]};
        if (record && some.count > 0) {
          higher = pebay_merge(all, higher, some, HigherMoments<double>{totals[kM3][v], totals[kM4][v]});
          low = least(low, totals[kMin][v]), high = largest(high, totals[kMax][v]);
        }
        all = chan_merge(all, some);
      }
      const double m2 = all.m2 < 0 ? 0 : all.m2;  // rounding only; NaN stays
      if (record) {
        const double m4 = higher.m4 < 0 ? 0 : higher.m4;
        write_record(p.record, p.shape.c, c, {all.count, all.mean, m2, higher.m3, m4, low, high});
      }
      if (!p.moments) return;
      means[c] = static_cast<A>(all.mean);
      spreads[c] = static_cast<A>(p.normalize ? 1 / std::sqrt(m2 / all.count + p.eps) : m2);
      if (p.running_mean) {
        const double mean = read(p.running_mean, c, 0.0), var = read(p.running_var, c, 0.0);
        write(p.running_mean, c, mean * (1 - momentum) + all.mean * momentum);
        write(p.running_var, c, var * (1 - momentum) + m2 / (all.count - 1) * momentum);
      }
      if (p.normalize) coefficients(c, columns);
    });
    if (as_one) record_active(group, measured_sums);
  };
  if (!p.moments) {
    for (std::int64_t group = 0; group < part.groups; ++group)
      for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
        if (p.running_mean) {
          means[c] = static_cast<A>(read(p.running_mean, c, 0.0));
          spreads[c] = static_cast<A>(1 / std::sqrt(read(p.running_var, c, 0.0) + p.eps));
        }
        coefficients(c, columns);
      });
  }
  const auto take_moments = record ? moments_tile<T, true> : moments_tile<T, false>;
  const auto normalize = record ? normalize_tile<T, true> : normalize_tile<T, false>;
  run<A>(
      part, sizeof(T), p.normalize && !as_one, p.threads, measured, measured_sums, applied_sums,
      [&](std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
        take_moments(part, p.x, group, tile, out);
        if (as_one) normalize(part, t, k, group, tile, sums);
      },
      [&](std::int64_t channels, double before, const Rows<double>& total, double count, const Rows<double>& tile) {
        if (record) join_higher(channels, before, total, count, tile);
        join_moments(channels, before, total, count, tile);
      },
      finish,
      [&](std::int64_t group, std::int64_t tile, const Rows<A>& sums) { normalize(part, t, k, group, tile, sums); },
      [&](std::int64_t group) {
        if (applied_sums.rows) record_active(group, applied_sums);
      });
}

template <class T>
void backward_as(const Backward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.dy, p.shape) && gapless(p.x, p.shape) && gapless(p.dx, p.shape) &&
                     gapless(p.dresidual, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;
  const double count = static_cast<double>(part.count());

  Workspace space(7 * Workspace::bytes<A>(part.width) + 3 * Workspace::bytes<double>(kMostRows * part.width));
  Coefficients<A> k{};
  for (A** array : {&k.mean, &k.invstd, &k.weight, &k.bias, &k.mean_dy, &k.mean_dy_xhat, &k.scale})
    *array = space.take<A>(part.width);
  const bool record_affine = p.record_affine && p.sums, record_gradient = p.record_gradient && p.dx;
  const Given measured = make_room(space, p.sums ? kGradSumsRows : 0, part.width);
  const Given measured_sums = make_room(space, record_affine ? kRecordedGradSumsRows : 0, part.width);
  const Given applied_sums = make_room(space, record_gradient ? kRecordedGradInputRows : 0, part.width);

  Tensors<T> t{};
  t.x = p.x, t.dy = p.dy, t.dx = p.dx, t.dresidual = p.dresidual;
  t.mask = const_cast<std::uint8_t*>(p.mask), t.relu = p.relu, t.training = p.training;
  t.stream = elements * static_cast<std::int64_t>(sizeof(T)) > kStreamBytes;

  A* const sums = static_cast<A*>(p.sum_dy);
  A* const products = static_cast<A*>(p.sum_dy_xhat);
  const auto means_of_sums = [&](const Columns& columns, double sum, double product) {
    set_all(k.mean_dy, columns, static_cast<A>(sum / count));
    set_all(k.mean_dy_xhat, columns, static_cast<A>(product / count));
  };
  for (std::int64_t group = 0; group < part.groups; ++group)
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      const A invstd = p.invstd ? static_cast<const A*>(p.invstd)[c] : A(1), weight = read(p.weight, c, A(1));
      set_all(k.mean, columns, p.mean ? static_cast<const A*>(p.mean)[c] : A(0));
      set_all(k.invstd, columns, invstd);
      set_all(k.weight, columns, weight);
      set_all(k.bias, columns, read(p.bias, c, A(0)));
      set_all(k.scale, columns, weight * invstd);
      if (!p.sums && p.training) means_of_sums(columns, sums[c], products[c]);
    });
  const auto grad_sums = record_affine ? grad_sums_tile<T, true> : grad_sums_tile<T, false>;
  const auto grad_input = record_gradient ? grad_input_tile<T, true> : grad_input_tile<T, false>;
  run<A>(
      part, 2 * sizeof(T), p.input, p.threads, measured, measured_sums, applied_sums,
      [&](std::int64_t group, std::int64_t tile, const Rows<double>& out, const Rows<A>& sums) {
        grad_sums(part, t, k, group, tile, out, sums);
      },
      [&](std::int64_t channels, double, const Rows<double>& total, double, const Rows<double>& tile) {
        join_sums(measured.rows, channels, total, tile);
      },
      [&](std::int64_t group) {
        for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
          const double sum = add_up(measured.totals[kSumDy], columns);
          const double product = add_up(measured.totals[kSumDyXhat], columns);
          if (sums) sums[c] = static_cast<A>(sum);
          if (products) products[c] = static_cast<A>(product);
          if (p.dbias) write(p.dbias, c, sum);
          if (p.dweight) write(p.dweight, c, product);
          means_of_sums(columns, sum, product);
          if (!record_affine) return;
          const auto total = [&](int r) { return add_up(measured_sums.totals[r], columns); };
          write_record(p.record_affine, p.shape.c, c,
                       {sum, total(kOfDy + kAbsSum), total(kOfDy + kSignSum), count - total(kOfDy + kZeros), product,
                        total(kOfDyXhat + kAbsSum), total(kOfDyXhat + kSignSum), count - total(kOfDyXhat + kZeros)});
        });
      },
      [&](std::int64_t group, std::int64_t tile, const Rows<A>& sums) { grad_input(part, t, k, group, tile, sums); },
      [&](std::int64_t group) {
        if (!record_gradient) return;
        for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
          const auto total = [&](int r) { return add_up(applied_sums.totals[r], columns); };
          write_record(p.record_gradient, p.shape.c, c,
                       {count, total(kDxSum), total(kDxAbsSum), total(kDxSquareSum), total(kDxPositive),
                        total(kDxNegative), total(kDxZero)});
        });
      });
}

}  // namespace

Partition make_partition(const Shape& shape, bool dense) {
  Partition part{};
  part.shape = shape;
  part.dense = dense;
  if (shape.rows) {
    std::int64_t factor = dense ? factor_to_16(shape.c) : 1;
    while (dense && factor * shape.c < kWideRow) factor *= 2;
    part.width = factor * shape.c;
    part.group = factor > 1 || part.width < kGroupChannels ? part.width : kGroupChannels;
    part.groups = divide_up(part.width, part.group);
    const std::int64_t elements = part.count() * shape.c;
    part.rows = dense ? elements / part.width : part.count();
    part.leftover = dense ? elements % part.width : 0;
    // Large tensors take larger tiles, up to what the second-level cache holds, so that joining them stays cheap.
    std::int64_t tile = elements / kRowTiles;
    tile = tile < kTileElements ? kTileElements : tile > 8 * kTileElements ? 8 * kTileElements : tile;
    part.rows_per_tile = tile / part.group < 8 ? 8 : tile / part.group;
    part.tiles = divide_up(part.rows, part.rows_per_tile) + (part.leftover > 0);
    // As long a sum as in a large tensor's tile, but blocks enough for many threads.
    const std::int64_t most = kBlockRows / part.rows_per_tile, few = part.tiles / kBlocks;
    part.tiles_per_block = std::max<std::int64_t>(1, std::min(most, few));
  } else {
    part.width = part.groups = shape.c;
    part.group = 1;
    const std::int64_t pieces = divide_up(shape.s, kTileElements);
    part.span = divide_up(divide_up(shape.s, pieces), kLanes) * kLanes;
    part.spans_per_plane = divide_up(shape.s, part.span);
    part.planes_per_tile = pieces > 1 ? 1 : kTileElements / shape.s;
    part.tiles = divide_up(shape.n, part.planes_per_tile) * part.spans_per_plane;
    part.tiles_per_block = 1;
  }
  return part;
}

void forward(const Forward& p) {
  with_dtype(p.dtype, [&](auto* t) { forward_as<std::remove_pointer_t<decltype(t)>>(p); });
}

void backward(const Backward& p) {
  with_dtype(p.dtype, [&](auto* t) { backward_as<std::remove_pointer_t<decltype(t)>>(p); });
}

}  // namespace bnkern::BNKERN_ISA
