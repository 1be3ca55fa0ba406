// Runs the tiles of the phases over threads, joins partial results in tile order, and turns them into the
// coefficients of the next phase. The order of work may differ with threads and size; no result does.
//
// Two ways to go, with the same bits:
//   by channel   a thread takes a whole channel through both phases: the second reads it from the thread's
//                own cache. Planes, where there are channels enough to keep all threads busy.
//   in step      all threads share the tiles of a batch of groups, phase by phase, the second phase from
//                the last tile to the first. Rows, whose channels lie side by side, and planes of few channels.
#include <cmath>
#include <cstdlib>
#include <type_traits>

#include "cpu.h"
#include "tiles.h"

namespace bnkern::BNKERN_ISA {
namespace {

constexpr std::int64_t kThreadElements = 16384;  // less than this is not worth another thread
constexpr std::int64_t kStreamBytes = 24 << 20;  // results larger than this are stored past the caches
constexpr std::int64_t kRowTiles = 512;          // rows: about as many tiles as there should be at most
constexpr std::int64_t kPlaneBytes = 256;        // shorter planes are better read in memory order
constexpr std::int64_t kBatchBytes = 8 << 20;    // what a batch of groups may hold, to be found in cache again

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

// Two numbers per wide channel, (mean, M2) or the two sums, and how many values of each channel they cover.
struct Pair {
  double *first, *second;
};

// Joins a tile's (mean, M2) to those of the tiles before it.
void join_moments(std::int64_t channels, double before, const Pair& total, double count, const Pair& tile) {
  if (before == 0) {
    std::memcpy(total.first, tile.first, channels * sizeof(double));
    std::memcpy(total.second, tile.second, channels * sizeof(double));
    return;
  }
  // chan_merge with its ratio of counts, the same for all channels, taken out of the loop.
  const double share = count / (before + count), weight = before * share;
  for (std::int64_t c = 0; c < channels; ++c) {
    const double delta = tile.first[c] - total.first[c];
    total.first[c] = fma(delta, share, total.first[c]);
    total.second[c] = fma(delta * delta, weight, total.second[c] + tile.second[c]);
  }
}

void join_sums(std::int64_t channels, double, const Pair& total, double, const Pair& tile) {
  for (std::int64_t c = 0; c < channels; ++c) {
    total.first[c] += tile.first[c];
    total.second[c] += tile.second[c];
  }
}

// How many values wide channel v saw.
double values_of(const Partition& part, std::int64_t v) {
  if (!part.shape.rows) return static_cast<double>(part.count());
  return static_cast<double>(part.rows + (v < part.leftover));
}

// ---- the two ways through two phases

// measure(group, tile, pair) gives a tile's partial result, join() adds it to its group's total, finish(group)
// makes the group's coefficients of it, apply(group, tile) is the second phase. Either phase may be absent.
template <class Measure, class Join, class Finish, class Apply>
void run(Partition& part, std::int64_t element_bytes, bool measuring, bool applying, int max_threads,
         const Pair& totals, Measure measure, Join join, Finish finish, Apply apply) {
  const std::int64_t elements = part.count() * part.shape.c;
  const std::int64_t enough = 1 + elements / kThreadElements;
  const int threads = enough < max_threads ? static_cast<int>(enough) : max_threads;
  const auto total_of = [&](std::int64_t group) {
    return Pair{totals.first + group * part.group, totals.second + group * part.group};
  };

  part.by_channel = !part.shape.rows && measuring && applying && part.groups >= threads &&
                    part.shape.s * element_bytes >= kPlaneBytes &&
                    (part.groups % threads == 0 || part.groups >= 4 * threads);
  if (part.by_channel) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (std::int64_t group = 0; group < part.groups; ++group) {
      double first, second, seen = 0;
      for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
        measure(group, tile, Pair{&first, &second});
        const double count = static_cast<double>(tile_count(part, tile));
        join(1, seen, total_of(group), count, Pair{&first, &second});
        seen += count;
      }
      finish(group);
      for (std::int64_t tile = 0; tile < part.tiles; ++tile) apply(group, tile);
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
  // Partial results lie tile by tile, groups side by side.
  const std::int64_t pitch = batch * part.group;
  Workspace space(measuring ? 2 * Workspace::bytes<double>(pitch * part.tiles) : 0);
  const Pair partial{space.take<double>(measuring ? pitch * part.tiles : 0),
                     space.take<double>(measuring ? pitch * part.tiles : 0)};

#pragma omp parallel num_threads(threads)
  for (std::int64_t from = 0; from < part.groups; from += batch) {
    const std::int64_t groups = part.groups - from < batch ? part.groups - from : batch;
    const std::int64_t units = groups * part.tiles;
    const auto partial_of = [&](std::int64_t tile, std::int64_t group) {
      const std::int64_t offset = tile * pitch + group * part.group;
      return Pair{partial.first + offset, partial.second + offset};
    };
    if (measuring) {
#pragma omp for schedule(static)
      for (std::int64_t unit = 0; unit < units; ++unit)
        measure(from + unit % groups, unit / groups, partial_of(unit / groups, unit % groups));
#pragma omp for schedule(static)
      for (std::int64_t group = 0; group < groups; ++group) {
        double seen = 0;
        for (std::int64_t tile = 0; tile < part.tiles; ++tile) {
          const double count = static_cast<double>(tile_count(part, tile));
          join(tile_channels(part, from + group, tile), seen, total_of(from + group), count, partial_of(tile, group));
          seen += count;
        }
        finish(from + group);
      }
    }
    if (applying) {
#pragma omp for schedule(static)
      for (std::int64_t unit = 0; unit < units; ++unit) {
        // After measuring, the last tiles first: they are still in cache. Within a tile memory order is kept.
        const std::int64_t tile = measuring ? part.tiles - 1 - unit / groups : unit / groups;
        apply(from + unit % groups, tile);
      }
    }
  }
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

bool gapless(const View& view, const Shape& shape) { return !view || view.outer == shape.c; }

template <class T>
void forward_as(const Forward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.x, p.shape) && gapless(p.residual, p.shape) && gapless(p.y, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;

  Workspace space(4 * Workspace::bytes<A>(part.width) + 2 * Workspace::bytes<double>(part.width));
  Coefficients<A> k{};
  k.mean = space.take<A>(part.width);
  k.invstd = space.take<A>(part.width);
  k.weight = space.take<A>(part.width);
  k.bias = space.take<A>(part.width);
  const Pair totals{space.take<double>(part.width), space.take<double>(part.width)};

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
  const auto finish = [&](std::int64_t group) {
    for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
      Moments<double> all{0, 0, 0};
      for (std::int64_t v = columns.first; v < columns.end; v += columns.step)
        all = chan_merge(all, Moments<double>{values_of(part, v), totals.first[v], totals.second[v]});
      const double m2 = all.m2 < 0 ? 0 : all.m2;  // rounding only; NaN stays
      means[c] = static_cast<A>(all.mean);
      spreads[c] = static_cast<A>(p.normalize ? 1 / std::sqrt(m2 / all.count + p.eps) : m2);
      if (p.running_mean) {
        const double mean = read(p.running_mean, c, 0.0), var = read(p.running_var, c, 0.0);
        write(p.running_mean, c, mean * (1 - momentum) + all.mean * momentum);
        write(p.running_var, c, var * (1 - momentum) + m2 / (all.count - 1) * momentum);
      }
      if (p.normalize) coefficients(c, columns);
    });
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
  run(
      part, sizeof(T), p.moments, p.normalize, p.threads, totals,
      [&](std::int64_t group, std::int64_t tile, const Pair& out) {
        moments_tile<T>(part, p.x, group, tile, out.first, out.second);
      },
      join_moments, finish, [&](std::int64_t group, std::int64_t tile) { normalize_tile<T>(part, t, k, group, tile); });
}

template <class T>
void backward_as(const Backward& p) {
  using A = Accumulator<T>;
  const bool dense = p.shape.rows && gapless(p.dy, p.shape) && gapless(p.x, p.shape) && gapless(p.dx, p.shape) &&
                     gapless(p.dresidual, p.shape);
  Partition part = make_partition(p.shape, dense);
  const std::int64_t elements = part.count() * p.shape.c;
  const double count = static_cast<double>(part.count());

  Workspace space(7 * Workspace::bytes<A>(part.width) + 2 * Workspace::bytes<double>(part.width));
  Coefficients<A> k{};
  for (A** array : {&k.mean, &k.invstd, &k.weight, &k.bias, &k.mean_dy, &k.mean_dy_xhat, &k.scale})
    *array = space.take<A>(part.width);
  const Pair totals{space.take<double>(part.width), space.take<double>(part.width)};
  std::memset(totals.first, 0, part.width * sizeof(double));
  std::memset(totals.second, 0, part.width * sizeof(double));

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
  run(
      part, 2 * sizeof(T), p.sums, p.input, p.threads, totals,
      [&](std::int64_t group, std::int64_t tile, const Pair& out) {
        grad_sums_tile<T>(part, t, k, group, tile, out.first, out.second);
      },
      join_sums,
      [&](std::int64_t group) {
        for_channels(part, group, [&](std::int64_t c, const Columns& columns) {
          double sum = 0, product = 0;
          for (std::int64_t v = columns.first; v < columns.end; v += columns.step)
            sum += totals.first[v], product += totals.second[v];
          if (sums) sums[c] = static_cast<A>(sum);
          if (products) products[c] = static_cast<A>(product);
          if (p.dbias) write(p.dbias, c, sum);
          if (p.dweight) write(p.dweight, c, product);
          means_of_sums(columns, sum, product);
        });
      },
      [&](std::int64_t group, std::int64_t tile) { grad_input_tile<T>(part, t, k, group, tile); });
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
  } else {
    part.width = part.groups = shape.c;
    part.group = 1;
    const std::int64_t pieces = divide_up(shape.s, kTileElements);
    part.span = divide_up(divide_up(shape.s, pieces), kLanes) * kLanes;
    part.spans_per_plane = divide_up(shape.s, part.span);
    part.planes_per_tile = pieces > 1 ? 1 : kTileElements / shape.s;
    part.tiles = divide_up(shape.n, part.planes_per_tile) * part.spans_per_plane;
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
