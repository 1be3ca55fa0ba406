// The plan of a tensor in row layout, [M, C] with adjacent channels: how it is divided among blocks and threads.
//
// A block processes a group of channels and a split of the rows, which is `rows_per_split` consecutive rows. Its
// threads form lanes of `columns` threads each. A thread processes the W channels of its column (8 or 1), so it can
// keep their sums, and every lanes-th row of the split. A tile of a thread is UNROLL of its rows. All loads of a tile
// are issued before the first value is used.
//
// W = 8 requires that C is a multiple of 8, and that strides and addresses are multiples of 16 bytes. Other tensors are
// read one element at a time. Their elementwise results are written by threads that process eight consecutive elements
// regardless of their channels, because such an octet has its own byte of the mask.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "records.h"

namespace bnkern {

struct RowsPlan {
  bool octets, single;  // whether threads read octets, and whether one kernel computes both phases
  std::int64_t rows, rows_per_split;
  int channels, width;         // width: the channels of a group; the last group may have fewer
  int columns, lanes;          // a block has columns * lanes threads
  int groups, splits;          // the grid has splits x groups blocks
  int tiles, tiles_in_shared;  // of a thread; a single-read kernel also holds one tile outside tiles_in_shared
  int tile_bytes;              // the size of a thread's tile

  BNKERN_HD int threads() const { return columns * lanes; }
};

// The number of rows in a thread's tile. With 8 channels it has 64 bytes of one tensor, or 32 bytes of each of two.
template <class T, int tensors>
constexpr int kUnroll = 16 / static_cast<int>(sizeof(T)) / 2 / tensors;

constexpr int kBlocksPerProcessor = 3;          // in the two-kernel strategy
constexpr int kGroupOctets = 8;                 // the largest group: 128 bytes of half-precision channels
constexpr int kGroupElements = 64;              // the same for channels that are read one at a time
constexpr std::int64_t kFewPartials = 4 << 10;  // bytes of parts that every block may read at little cost

// The shared memory of a block: the pairs of sums of its threads, scratch memory for their reduction, the coefficients
// or means of its channels, and tiles.
struct RowsShared {
  Pair* pairs;         // [W, threads + 2]
  PivotSums* scratch;  // [threads]
  Affine* of_channel;  // [width]
  Words* tiles;

  static BNKERN_HD std::size_t pairs_bytes(int threads) { return (threads + 2) * 8 * sizeof(Pair); }
  static BNKERN_HD std::size_t fixed_bytes(int threads, int width) {
    return pairs_bytes(threads) + threads * sizeof(PivotSums) + width * sizeof(Affine);
  }
  BNKERN_DEVICE explicit RowsShared(int width) {
    const int threads = static_cast<int>(blockDim.x);
    pairs = shared_memory<Pair>();
    scratch = shared_memory<PivotSums>(pairs_bytes(threads));
    of_channel = shared_memory<Affine>(pairs_bytes(threads) + threads * sizeof(PivotSums));
    tiles = shared_memory<Words>(fixed_bytes(threads, width));
  }
  // The pair of channel j of a thread. Neighbouring threads write adjacent pairs. The padding of two pairs after each
  // channel puts neighbouring channels into different banks.
  BNKERN_DEVICE Pair& pair(int j, int thread) const { return pairs[j * (blockDim.x + 2) + thread]; }
};

// Makes the plan for one strategy. With `octets` a thread processes 8 channels. `unroll` is kUnroll, and `tile_bytes`
// is the size of a thread's tile in shared memory.
inline RowsPlan plan_strategy(const Shape& shape, const CudaDevice& device, bool single, bool octets, int unroll,
                              int tile_bytes) {
  RowsPlan plan{};
  plan.octets = octets, plan.single = single;
  plan.rows = shape.n * shape.s;
  plan.channels = static_cast<int>(shape.c);
  plan.tile_bytes = tile_bytes;
  const int per_thread = octets ? 8 : 1;
  // Two blocks of the two-kernel strategy fit on a multiprocessor.
  const int threads = single ? device.threads : std::max(device.threads / 2, 32);
  const std::int64_t columns_of_all = shape.c / per_thread;
  const std::int64_t blocks = std::int64_t{device.multiprocessors} * (single ? 1 : kBlocksPerProcessor);
  const auto divide = [&](std::int64_t columns) {
    plan.columns = static_cast<int>(columns);
    plan.width = plan.columns * per_thread;
    plan.lanes = threads / plan.columns;
    plan.groups = static_cast<int>(divide_up(columns_of_all, columns));
    const std::int64_t splits = plan.groups > kGroups ? 1 : std::max<std::int64_t>(1, blocks / plan.groups);
    // Splits are not made much shorter than one row per lane. The rows are divided evenly among the splits.
    plan.rows_per_split = std::max<std::int64_t>(divide_up(plan.rows, splits), plan.lanes);
    plan.rows_per_split = divide_up(plan.rows, divide_up(plan.rows, plan.rows_per_split));
    plan.splits = static_cast<int>(divide_up(plan.rows, plan.rows_per_split));
  };
  const std::int64_t most = std::min(octets ? kGroupOctets : kGroupElements, threads / per_thread);
  divide(std::min(columns_of_all, most));
  // In the single-read strategy every block reads all parts of its group. If these are large compared with the block's
  // own data, the groups are made narrower, because then each has fewer splits.
  while (single && octets && plan.columns > 2) {
    const std::int64_t parts = plan.splits * plan.width * static_cast<std::int64_t>(sizeof(Pair));
    const std::int64_t own = divide_up(plan.rows_per_split, unroll) * plan.columns * tile_bytes;
    if (parts <= kFewPartials || parts <= own / 4) break;
    divide(plan.columns > 4 ? 4 : 2);
  }
  plan.tiles = static_cast<int>(divide_up(plan.rows_per_split, std::int64_t{plan.lanes} * unroll));
  if (single) {
    const std::int64_t room = device.shared_bytes - RowsShared::fixed_bytes(plan.threads(), plan.width);
    const std::int64_t fit = std::max<std::int64_t>(0, room / (plan.threads() * tile_bytes));
    plan.tiles_in_shared = static_cast<int>(std::min<std::int64_t>(fit, plan.tiles - 1));
  }
  return plan;
}
BNKERN_HD std::size_t shared_bytes(const RowsPlan& plan) {
  return RowsShared::fixed_bytes(plan.threads(), plan.width) +
         static_cast<std::size_t>(plan.tiles_in_shared) * plan.threads() * plan.tile_bytes;
}

// The additional shared memory of a block that computes a record: the sums of its threads. The sums of a thread are
// adjacent, so one base address serves all of them. The distance between two threads is an odd number of words, so
// neighbouring threads use different banks.
template <class Sums, int W>
constexpr int kTallied = static_cast<int>(sizeof(Sums) / sizeof(float)) * W | 1;
template <class Sums, int W>
std::size_t tally_bytes(const RowsPlan& plan) {
  return std::size_t{kTallied<Sums, W>} * plan.threads() * sizeof(float);
}

// Makes room for these sums in the shared memory of a block, which then holds fewer tiles. Nothing else of the plan
// changes, so the bits stay the same. Returns "" or the reason why there is not enough memory.
inline std::string make_room(RowsPlan* plan, std::size_t tally, const CudaDevice& device) {
  const std::int64_t fixed = RowsShared::fixed_bytes(plan->threads(), plan->width) + tally;
  const std::int64_t room = device.shared_bytes - fixed, tile = plan->threads() * plan->tile_bytes;
  if (room < 0)
    return "record: a block needs " + std::to_string(fixed) + " bytes of shared memory, the device gives it " +
           std::to_string(device.shared_bytes);
  plan->tiles_in_shared = static_cast<int>(std::min<std::int64_t>(plan->tiles_in_shared, room / tile));
  return {};
}

// The channels and rows of a thread.
struct RowsCoord {
  int split, group, column, lane;
  std::int64_t channel;     // the first of its W channels; active() is false if it does not exist
  std::int64_t begin, end;  // the rows of the split
  int lanes;

  BNKERN_DEVICE RowsCoord(const RowsPlan& plan, int split, int group, int per_thread)
      : split(split),
        group(group),
        column(static_cast<int>(threadIdx.x) % plan.columns),
        lane(static_cast<int>(threadIdx.x) / plan.columns),
        channel(std::int64_t(group) * plan.width + column * per_thread),
        begin(split * plan.rows_per_split),
        end(begin + plan.rows_per_split < plan.rows ? begin + plan.rows_per_split : plan.rows),
        lanes(plan.lanes) {}
  BNKERN_DEVICE bool active(const RowsPlan& plan) const { return channel < plan.channels; }
  // The first row of a tile. valid_rows() is the number of its `unroll` rows that exist.
  BNKERN_DEVICE std::int64_t row(int tile, int unroll) const {
    return begin + std::int64_t(tile) * unroll * lanes + lane;
  }
  BNKERN_DEVICE int valid_rows(const RowsPlan& plan, std::int64_t row, int unroll) const {
    if (!active(plan) || row >= end) return 0;
    if (row + std::int64_t(unroll - 1) * lanes < end) return unroll;
    return static_cast<int>((end - row + lanes - 1) / lanes);
  }
  // The number of rows of the split that a lane processes.
  BNKERN_DEVICE int taken(int by_lane) const {
    const std::int64_t all = end - begin;
    return static_cast<int>(all / lanes) + (by_lane < all % lanes);
  }
};

// Calls f(tile, its first row, its valid rows) for a thread's tiles from `first` to the last, or in the reverse order.
template <bool backwards, class F>
BNKERN_DEVICE void for_tiles(const RowsPlan& plan, const RowsCoord& coord, int first, int unroll, F f) {
  for (int i = first; i < plan.tiles; ++i) {
    const int tile = backwards ? plan.tiles - 1 - i + first : i;
    const std::int64_t row = coord.row(tile, unroll);
    f(tile, row, coord.valid_rows(plan, row, unroll));
  }
}

// The tiles that a single-read kernel holds in shared memory. These are the tiles from `first` to plan.tiles_in_shared,
// each with kRows rows of kTensors tensors. The octets of neighbouring threads are adjacent.
template <class T, int kRows, int kTensors>
struct HeldTiles {
  Words* tiles;
  int first;
  BNKERN_DEVICE Octet<T>& operator()(int tile, int row, int tensor) const {
    const int octet = ((tile - first) * kRows + row) * kTensors + tensor;
    return reinterpret_cast<Octet<T>*>(tiles)[octet * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
  }
};

// Joins the pairs of a block's threads. part(lane, pair) converts a thread's pair to sums that can be added. One thread
// calls done(channel, sums) for each channel.
template <int W, class Part, class Done>
BNKERN_DEVICE void join_threads(const RowsPlan& plan, int group, const RowsShared& shared, Part part, Done done) {
  const std::int64_t first = std::int64_t(group) * plan.width;
  __syncthreads();
  sum_over_block(
      plan.width, plan.lanes, shared.scratch,
      [&](int lane, int c) { return part(lane, shared.pair(c % W, lane * plan.columns + c / W)); },
      [&](int c, PivotSums sums) {
        if (first + c < plan.channels) done(first + c, sums);
      });
}

// Joins the parts of the blocks of a group. All blocks must have written them. part(split, channel) returns a part as
// sums that can be added. One thread calls done(channel within the group, sums) for each channel.
template <class Part, class Done>
BNKERN_DEVICE void join_blocks(const RowsPlan& plan, int group, const RowsShared& shared, Part part, Done done) {
  const std::int64_t first = std::int64_t(group) * plan.width;
  sum_over_block(
      plan.width, plan.splits, shared.scratch,
      [&](int split, int c) { return first + c < plan.channels ? part(split, first + c) : PivotSums{0, 0}; },
      [&](int c, PivotSums sums) {
        if (first + c < plan.channels) done(c, sums);
      });
}

// The number of rows of split k.
BNKERN_DEVICE double rows_of(const RowsPlan& plan, int k) {
  const std::int64_t left = plan.rows - k * plan.rows_per_split;
  return static_cast<double>(left < plan.rows_per_split ? left : plan.rows_per_split);
}

// Whether octets of all these views can be loaded at once. Null views are ignored.
inline bool by_octets(const Shape& shape, DType dtype, std::initializer_list<View> views) {
  const std::int64_t step = dtype == DType::kFloat32 ? 4 : 8;  // elements of 16 bytes
  return shape.c % 8 == 0 && std::all_of(views.begin(), views.end(), [&](const View& view) {
           return !view || (view.outer % step == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0);
         });
}

// Makes the plan of a call. `single` means that both phases are requested and may be one kernel. One kernel is used if
// threads can read octets and a block can hold at least one in eight of its tiles. Otherwise one kernel would read most
// of the data twice too.
template <class T, int kTensors>
RowsPlan plan_rows(const Shape& shape, const CudaDevice& device, bool octets, bool single) {
  constexpr int kTile = kUnroll<T, kTensors>;
  constexpr int kTileBytes = kTile * kTensors * 8 * static_cast<int>(sizeof(T));
  if (single && octets) {
    const RowsPlan plan = plan_strategy(shape, device, true, octets, kTile, kTileBytes);
    if ((plan.tiles_in_shared + 1) * 8 >= plan.tiles) return plan;
  }
  return plan_strategy(shape, device, false, octets, kTile, kTileBytes);
}

// The grid of a kernel that processes eight consecutive elements at a time, regardless of their channels.
inline dim3 flat_blocks(const Shape& shape, const CudaDevice& device) {
  const std::int64_t wanted = divide_up(divide_up(shape.n * shape.s * shape.c, 8), device.threads);
  return {static_cast<unsigned>(std::min<std::int64_t>(wanted, 8 * device.multiprocessors)), 1, 1};
}

// W adjacent values of storage type.
template <class T, int W>
struct Vector;
template <class T>
struct Vector<T, 8> : Octet<T> {
  static BNKERN_DEVICE Vector load(const T* p) { return {Octet<T>::load(p)}; }
};
template <class T>
struct Vector<T, 1> {
  T value;
  BNKERN_DEVICE float operator[](int) const { return widen(value); }
  static BNKERN_DEVICE Vector load(const T* p) { return {*p}; }
};

// The sums of a record for a thread's W channels. They are in shared memory, because there are not enough registers. No
// other thread reads them before publish(). add(j, sums) joins the sums of a few values of channel j.
template <class Sums, int W>
struct Tally {
  float* mine;

  BNKERN_DEVICE explicit Tally(std::size_t offset)
      : mine(shared_memory<float>(offset) + threadIdx.x * kTallied<Sums, W>) {
    const Sums none{};
#pragma unroll
    for (int j = 0; j < W; ++j)
#pragma unroll
      for (int row = 0; row < kRows; ++row) at(row, j) = none.row[row];
  }
  BNKERN_DEVICE void add(int j, const Sums& addend) const {
#pragma unroll
    for (int row = 0; row < kRows; ++row) at(row, j) = joined<Sums>(row, addend.row[row], at(row, j));
  }
  // Joins the block's lanes in their order and stores the result as the block's part. All threads must call it.
  BNKERN_DEVICE void publish(const RowsPlan& plan, const RowsCoord& coord, const RecordParts& parts) const {
    __syncthreads();
    const std::int64_t first = std::int64_t(coord.group) * plan.width;
    for (int i = static_cast<int>(threadIdx.x); i < kRows * plan.width; i += static_cast<int>(blockDim.x)) {
      const int row = i / plan.width, c = i % plan.width;
      if (first + c >= plan.channels) continue;
      const float* const from = mine + (c / W - static_cast<int>(threadIdx.x)) * kTallied<Sums, W> + row * W + c % W;
      double all = from[0];
#pragma unroll 8
      for (int lane = 1; lane < plan.lanes; ++lane)
        all = joined<Sums, double>(row, from[lane * plan.columns * kTallied<Sums, W>], all);
      parts.at(coord.split, row, first + c) = all;
    }
    __syncthreads();
  }

 private:
  static constexpr int kRows = sizeof(Sums) / sizeof(float);
  BNKERN_DEVICE float& at(int row, int j) const { return mine[row * W + j]; }
};

}  // namespace bnkern
