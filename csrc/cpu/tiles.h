// The partition of a tensor. It depends only on the shape and on whether the tensors are dense, never on the number of
// threads. Partial results are computed for each tile and joined in the order of tiles, so every run gives the same
// bits.
//
// A group is a set of adjacent channels that share one loop over tiles. It has one channel (planes) or several (rows).
// A tile is a part of a group along N and S. A tile of planes has about kTileElements elements, so a second pass over
// it reads from the first-level cache. A tile of rows is several times larger. A span is a contiguous run in a tile.
//
// Dense rows are read as flat memory in "wide" rows of lcm(C, 16) elements or a multiple of it. So for any C every span
// of a wide row consists of whole vectors and of whole bytes of the mask. At the end the results of the wide channels
// are reduced to those of the C channels.
#pragma once

#include <cstdlib>

#include "../params.h"
#include "storage.h"

namespace bnkern::BNKERN_ISA {

constexpr std::int64_t kTileElements = 8192;
constexpr std::int64_t kGroupChannels = 256;  // rows: a span has 1 KB of fp32, and the L1 cache holds the accumulators
constexpr std::int64_t kWideRow = 128;        // the least width of dense rows; narrower rows are joined to wide rows

struct Partition {
  Shape shape;
  bool dense;                                           // rows only: no tensor has gaps
  std::int64_t width;                                   // the number of channels, or of wide channels
  std::int64_t group;                                   // the number of them in a group
  std::int64_t groups, tiles;                           // the grid: groups x tiles
  std::int64_t planes_per_tile, spans_per_plane, span;  // planes
  std::int64_t rows, leftover, rows_per_tile;           // rows; `leftover` elements follow the last whole wide row
  std::int64_t tiles_per_block;                         // the number of tiles that share the sums of a record
  bool by_channel;  // the schedule (drive.h); tiles depend on it only for their prefetch distances

  std::int64_t count() const { return shape.n * shape.s; }
};

// The shape must not be empty. If rows are not dense, C must be a multiple of 16.
Partition make_partition(const Shape& shape, bool dense);

// A contiguous run of elements. The indices give its start in every tensor of the partition.
struct Span {
  std::int64_t n, c, s;  // planes: sample, channel, position; rows: (wide) row, (wide) channel, 0
  std::int64_t length;
  std::int64_t mask_byte;
};

template <class T>
BNKERN_INLINE T* at(const Partition& part, const View& view, const Span& span) {
  const std::int64_t offset = !part.shape.rows ? span.n * view.outer + span.c * view.inner + span.s
                              : part.dense     ? span.n * part.width + span.c
                                               : span.n * view.outer + span.c;
  return static_cast<T*>(view.data) + offset;
}

// Calls f(span) for the spans of a tile in memory order.
template <class F>
BNKERN_INLINE void for_spans(const Partition& part, std::int64_t group, std::int64_t tile, F f) {
  if (part.shape.rows) {
    const std::int64_t c = group * part.group;
    const std::int64_t channels = part.width - c < part.group ? part.width - c : part.group;
    const std::int64_t first = tile * part.rows_per_tile;
    if (first >= part.rows) return f(Span{part.rows, 0, 0, part.leftover, part.rows * part.width / 8});
    const std::int64_t end = part.rows - first < part.rows_per_tile ? part.rows : first + part.rows_per_tile;
    for (std::int64_t r = first; r < end; ++r) f(Span{r, c, 0, channels, (r * part.width + c) / 8});
  } else {
    const std::int64_t plane_bytes = (part.shape.s + 7) / 8;
    const std::int64_t first = tile / part.spans_per_plane * part.planes_per_tile;
    const std::int64_t end = part.shape.n - first < part.planes_per_tile ? part.shape.n : first + part.planes_per_tile;
    const std::int64_t s = tile % part.spans_per_plane * part.span;
    const std::int64_t length = part.shape.s - s < part.span ? part.shape.s - s : part.span;
    for (std::int64_t n = first; n < end; ++n)
      f(Span{n, group, s, length, (n * part.shape.c + group) * plane_bytes + s / 8});
  }
}

// The same for rows. Calls four(spans) for every four rows, and one(span) for each row of the rest. With four rows at a
// time, the sums of a channel are loaded and stored once for four values.
template <class Four, class One>
BNKERN_INLINE void for_rows(const Partition& part, std::int64_t group, std::int64_t tile, Four four, One one) {
  Span waiting[4];
  int count = 0;
  for_spans(part, group, tile, [&](const Span& span) __attribute__((always_inline)) {
    waiting[count++] = span;
    if (count == 4) four(waiting), count = 0;
  });
  for (int r = 0; r < count; ++r) one(waiting[r]);
}

// The number of values that a tile has of each channel of the group.
BNKERN_INLINE std::int64_t tile_count(const Partition& part, std::int64_t tile) {
  if (part.shape.rows) {
    const std::int64_t left = part.rows - tile * part.rows_per_tile;
    return left <= 0 ? 1 : left < part.rows_per_tile ? left : part.rows_per_tile;
  }
  const std::int64_t planes = part.shape.n - tile / part.spans_per_plane * part.planes_per_tile;
  const std::int64_t length = part.shape.s - tile % part.spans_per_plane * part.span;
  return (planes < part.planes_per_tile ? planes : part.planes_per_tile) * (length < part.span ? length : part.span);
}

// The number of channels of the group in a tile. It is smaller than the group only in the leftover of wide rows.
BNKERN_INLINE std::int64_t tile_channels(const Partition& part, std::int64_t group, std::int64_t tile) {
  if (!part.shape.rows) return 1;
  if (tile * part.rows_per_tile >= part.rows) return part.leftover;
  const std::int64_t c = group * part.group;
  return part.width - c < part.group ? part.width - c : part.group;
}

// The coefficients of each channel. Each array has `width` elements.
template <class A>
struct Coefficients {
  A *mean, *invstd, *weight, *bias;
  A *mean_dy, *mean_dy_xhat, *scale;  // backward
};

// The tensors that the tiles of the four phases read and write. The functions are in <phase>.cpp.
template <class T>
struct Tensors {
  View x, residual, y, dy, dx, dresidual;
  View g;  // if it is not null, grad_sums stores g there; only for rows
  std::uint8_t* mask;
  Activation act;
  bool training, stream;  // stream: the results are too large for the caches and are stored past them
};

// Several values for each channel. The value of row r of channel c is data[r * pitch + c].
template <class D>
struct Rows {
  D* data = nullptr;
  std::int64_t pitch = 0;
  BNKERN_INLINE D* operator[](int r) const { return data + r * pitch; }
  BNKERN_INLINE Rows at(std::int64_t channel) const { return {data + channel, pitch}; }
};

// The values that a tile function computes for each of tile_channels() channels. `out` receives the values from which
// the results are computed. With `record`, `out` or `sums` also receives the values that only a record needs. This does
// not change a bit of the results. A tile of rows adds whole vectors to `sums`, because several tiles share them: a
// tile of rows has few values of many channels. A tile of planes overwrites its `sums`.
//
//                out                                    sums
//   moments      kMean, kM2; record: kM3 to kNonfinite
//   normalize                                           kActive
//   grad_sums    kSumDy, kSumDyXhat                     kOfDy and kOfDyXhat: kAbsSum, kSignSum, kZeros of the summands
//   grad_input                                          kDxSum to kDxZero
constexpr int kMean = 0, kM2 = 1, kMomentsRows = 2, kM3 = 2, kM4 = 3, kMin = 4, kMax = 5, kNonfinite = 6;
constexpr int kRecordedMomentsRows = 7;
constexpr int kWeight = 2, kWeightedMomentsRows = 3;  // with sample_weight, which excludes a record
constexpr int kActive = 0, kRecordedNormalizeRows = 1;
constexpr int kSumDy = 0, kSumDyXhat = 1, kGradSumsRows = 2;
constexpr int kAbsSum = 0, kSignSum = 1, kZeros = 2, kOfDy = 0, kOfDyXhat = 3, kRecordedGradSumsRows = 6;
constexpr int kDxSum = 0, kDxAbsSum = 1, kDxSquareSum = 2, kDxPositive = 3, kDxNegative = 4, kDxZero = 5;
constexpr int kRecordedGradInputRows = 6;
constexpr int kMostRows = 7;

// Sums of g and of g * xhat of each sample. A tile adds to the units of its samples. No two tiles write one unit:
//   planes   a unit is a span, so a sample has spans_per_plane units, from sample * spans_per_plane on
//   rows     unit tile + sample has the rows of the sample in the tile
template <class A>
struct SampleSums {
  A* data = nullptr;
  std::int64_t units, channels;
  bool rows;  // if true, the channels of a unit are adjacent, and otherwise the units of a channel

  SampleSums() = default;
  SampleSums(const Partition& part, A* memory)
      : data(memory), units(units_of(part)), channels(part.shape.c), rows(part.shape.rows) {}
  static std::int64_t units_of(const Partition& part) {
    return part.shape.rows ? part.tiles + part.shape.n : part.shape.n * part.spans_per_plane;
  }
  BNKERN_INLINE A* of_g(std::int64_t unit, std::int64_t c) const {
    return data + (rows ? unit * channels + c : c * units + unit);
  }
  BNKERN_INLINE A* of_product(std::int64_t unit, std::int64_t c) const { return of_g(unit, c) + units * channels; }
};

// The first unit of a sample and the last, which is included.
struct Units {
  std::int64_t first, last;
};
inline Units units_of_sample(const Partition& part, std::int64_t sample) {
  if (!part.shape.rows) return {sample * part.spans_per_plane, (sample + 1) * part.spans_per_plane - 1};
  const auto tile_of = [&](std::int64_t row) {  // of rows of C values
    const std::int64_t wide_row = row * part.shape.c / part.width;
    return wide_row >= part.rows ? part.tiles - 1 : wide_row / part.rows_per_tile;
  };
  return {tile_of(sample * part.shape.s) + sample, tile_of((sample + 1) * part.shape.s - 1) + sample};
}

template <class T, bool record>
void moments_tile(const Partition&, const View& x, std::int64_t group, std::int64_t tile, Rows<double> out);
template <class T, bool record>
void normalize_tile(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, std::int64_t group,
                    std::int64_t tile, Rows<Accumulator<T>> sums);
template <class T, bool record>
void grad_sums_tile(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, std::int64_t group,
                    std::int64_t tile, Rows<double> out, Rows<Accumulator<T>> sums);
template <class T, bool record>
void grad_input_tile(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, std::int64_t group,
                     std::int64_t tile, Rows<Accumulator<T>> sums);
template <class T>
void sample_sums_tile(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&, std::int64_t group,
                      std::int64_t tile, const SampleSums<Accumulator<T>>& out);

// moments and grad_input with sample_weight. The former writes kMean, kM2 and kWeight, the sum of the tile's weights.
template <class T>
void weighted_moments_tile(const Partition&, const View& x, const Accumulator<T>* weights, std::int64_t group,
                           std::int64_t tile, Rows<double> out);
template <class T>
void weighted_grad_input_tile(const Partition&, const Tensors<T>&, const Coefficients<Accumulator<T>>&,
                              const Accumulator<T>* weights, std::int64_t group, std::int64_t tile);
template <class A>
double sum_of_weights(const A* weights, std::int64_t count);

#define BNKERN_FOR_STORAGE_TYPES(macro) macro(float) macro(BFloat16) macro(Float16) macro(double)

// The coefficients at element i of a span. All elements of a span have the same channel (planes), or each has its own
// (rows).
template <class A>
struct PlaneChannel {
  Vec<A> value;
  BNKERN_INLINE PlaneChannel(const A* array, std::int64_t channel) : value(Vec<A>::all(array[channel])) {}
  BNKERN_INLINE Vec<A> operator[](std::int64_t) const { return value; }
};
template <class A>
struct RowChannels {
  const A* array;
  BNKERN_INLINE RowChannels(const A* array, std::int64_t channel) : array(array + channel) {}
  BNKERN_INLINE Vec<A> operator[](std::int64_t i) const { return Vec<A>::load(array + i); }
};

BNKERN_INLINE std::uint16_t load_bits(const std::uint8_t* mask, std::int64_t i, int n = kLanes) {
  if (n <= 8) return mask[i / 8];
  std::uint16_t bits;
  std::memcpy(&bits, mask + i / 8, 2);
  return bits;
}
BNKERN_INLINE void store_bits(std::uint8_t* mask, std::int64_t i, std::uint16_t bits, int n = kLanes) {
  if (n < kLanes) bits &= static_cast<std::uint16_t>((1 << n) - 1);
  if (n <= 8)
    mask[i / 8] = static_cast<std::uint8_t>(bits);
  else
    std::memcpy(mask + i / 8, &bits, 2);
}

// Memory of a thread for the accumulators of tiles of rows. It grows on demand and is kept until the thread ends.
struct Scratch {
  void* data = nullptr;
  std::size_t size = 0;
  ~Scratch() { std::free(data); }
};
template <class A>
inline A* zeroed_scratch(std::int64_t count) {
  static thread_local Scratch scratch;
  const std::size_t size = (count * sizeof(A) + 63) / 64 * 64;
  if (size > scratch.size) {
    std::free(scratch.data);
    scratch.data = std::aligned_alloc(64, size);
    scratch.size = size;
  }
  std::memset(scratch.data, 0, size);
  return static_cast<A*>(scratch.data);
}

// Prefetch distance in elements for a pass over a view. The hardware prefetchers stop at every 4 KB page. They do not
// continue from one plane of a channel to the next, which is far away in memory. A prefetch past the end of the view is
// harmless.
template <class T>
BNKERN_INLINE std::int64_t read_ahead(const Partition& part, const View& view) {
  constexpr std::int64_t kPage = 4096, kAhead = 2048;
  if (part.shape.rows) return 4 * (part.dense ? part.width : view.outer);  // four rows are read at a time
  if (part.shape.s * static_cast<std::int64_t>(sizeof(T)) <= kPage) return part.by_channel ? view.outer : view.inner;
  return kAhead / static_cast<std::int64_t>(sizeof(T));
}

// Distance in elements from a position in a tile to the same position in the tile that the thread reads next.
BNKERN_INLINE std::int64_t next_tile(const Partition& part, const View& view) {
  if (part.shape.rows)
    return part.groups > 1 ? part.group : part.rows_per_tile * (part.dense ? part.width : view.outer);
  if (!part.by_channel) return view.inner;
  return part.spans_per_plane > 1 ? part.span : part.planes_per_tile * view.outer;
}

// Whether streaming stores may be used. The address must be a multiple of the size of 16 values, or null.
template <class T>
BNKERN_INLINE bool streamable(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

}  // namespace bnkern::BNKERN_ISA
