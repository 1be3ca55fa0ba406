// Rows [M, C], channels side by side, as blocks see them.
//
// A block owns a group of channels and a split of the rows, `rows_per_split` consecutive ones. Its threads form lanes
// of `columns` threads: a thread stays with the W channels of its column, 8 or 1, so that sums are its own, and
// takes every lanes-th row. UNROLL of its rows are a tile; their loads are all in flight before the first is used.
// Eight channels at a time need C, strides and addresses to be multiples of whole octets; any other tensor is read one
// element at a time, and what is written of it is written by flat octets of memory, which own their mask bytes.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "records.h"

namespace bnkern {

struct RowsPlan {
  std::int64_t rows, rows_per_split;
  int channels, width;         // width: channels of a group, the last of which may have fewer
  int columns, lanes;          // threads of a block: columns * lanes
  int groups, splits;          // blocks: splits x groups
  int tiles, tiles_in_shared;  // of a split; a single-read kernel holds one more in registers
  int tile_bytes;              // of a thread's tile

  BNKERN_HD int threads() const { return columns * lanes; }
};

// How many rows of a thread are in flight: 64 bytes of each of one tensor, or 32 of each of two.
template <class T, int tensors>
constexpr int kUnroll = 16 / static_cast<int>(sizeof(T)) / 2 / tensors;

constexpr int kBlocksPerProcessor = 3;          // of the two-kernel strategy
constexpr int kGroupOctets = 8;                 // at most: 128 bytes of half-precision channels
constexpr int kGroupElements = 64;              // the same, read one by one
constexpr std::int64_t kFewPartials = 4 << 10;  // bytes that every block may well read of the others

// What a block keeps in shared memory: pairs of its threads' sums, room to add them up, what its channels are
// normalised or centred by, and tiles.
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
  // The pair of channel j of a thread. Neighbouring threads write neighbouring pairs, and by the two more between the
  // channels, neighbouring channels are read from different banks.
  BNKERN_DEVICE Pair& pair(int j, int thread) const { return pairs[j * (blockDim.x + 2) + thread]; }
};

// `octets`: threads take 8 channels. `unroll` as in kUnroll; `tile_bytes`: a thread's tile on chip.
inline RowsPlan rows_plan(const Shape& shape, const CudaDevice& device, bool single_read, bool octets, int unroll,
                          int tile_bytes) {
  RowsPlan plan{};
  plan.rows = shape.n * shape.s;
  plan.channels = static_cast<int>(shape.c);
  plan.tile_bytes = tile_bytes;
  const int per_thread = octets ? 8 : 1;
  const int threads = single_read ? device.threads : std::max(device.threads / 2, 32);  // two blocks beside each other
  const std::int64_t columns_of_all = shape.c / per_thread;
  const std::int64_t blocks = std::int64_t{device.multiprocessors} * (single_read ? 1 : kBlocksPerProcessor);
  const auto cut = [&](std::int64_t columns) {
    plan.columns = static_cast<int>(columns);
    plan.width = plan.columns * per_thread;
    plan.lanes = threads / plan.columns;
    plan.groups = static_cast<int>(divide_up(columns_of_all, columns));
    const std::int64_t splits = plan.groups > kGroups ? 1 : std::max<std::int64_t>(1, blocks / plan.groups);
    // Work for every thread, and as much for every block.
    plan.rows_per_split = std::max<std::int64_t>(divide_up(plan.rows, splits), plan.lanes);
    plan.rows_per_split = divide_up(plan.rows, divide_up(plan.rows, plan.rows_per_split));
    plan.splits = static_cast<int>(divide_up(plan.rows, plan.rows_per_split));
  };
  const std::int64_t most = std::min(octets ? kGroupOctets : kGroupElements, threads / per_thread);
  cut(std::min(columns_of_all, most));
  // In a single read every block reads the parts of its group: where these are many, narrower groups have fewer.
  while (single_read && octets && plan.columns > 2) {
    const std::int64_t parts = plan.splits * plan.width * static_cast<std::int64_t>(sizeof(Pair));
    const std::int64_t own = divide_up(plan.rows_per_split, unroll) * plan.columns * tile_bytes;
    if (parts <= kFewPartials || parts <= own / 4) break;
    cut(plan.columns > 4 ? 4 : 2);
  }
  plan.tiles = static_cast<int>(divide_up(plan.rows_per_split, std::int64_t{plan.lanes} * unroll));
  if (single_read) {
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

// What a block of a kernel that records needs besides: its threads' sums. A thread's lie side by side, an odd number of
// words from the next thread's, so that neighbours use different banks and an address is one for all of a thread's.
template <class Sums, int W>
constexpr int kTallied = static_cast<int>(sizeof(Sums) / sizeof(float)) * W | 1;
template <class Sums, int W>
std::size_t tally_bytes(const RowsPlan& plan) {
  return std::size_t{kTallied<Sums, W>} * plan.threads() * sizeof(float);
}

// Makes room for such a tally beside what a block keeps: fewer tiles are held, and the cut, and so the bits, stay. Says
// why there is none.
inline std::string make_room(RowsPlan* plan, std::size_t tally, const CudaDevice& device) {
  const std::int64_t fixed = RowsShared::fixed_bytes(plan->threads(), plan->width) + tally;
  const std::int64_t room = device.shared_bytes - fixed, tile = plan->threads() * plan->tile_bytes;
  if (room < 0)
    return "record: a block needs " + std::to_string(fixed) + " bytes of shared memory, the device gives it " +
           std::to_string(device.shared_bytes);
  plan->tiles_in_shared = static_cast<int>(std::min<std::int64_t>(plan->tiles_in_shared, room / tile));
  return {};
}

// Where a thread of a block works.
struct RowsCoord {
  int split, group, column, lane;
  std::int64_t channel;     // the first of its W
  std::int64_t begin, end;  // rows of the split; none where there is no such channel
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
  // The first row of a tile, and how many of its `unroll` rows there are.
  BNKERN_DEVICE std::int64_t row(int tile, int unroll) const {
    return begin + std::int64_t(tile) * unroll * lanes + lane;
  }
  BNKERN_DEVICE int valid_rows(const RowsPlan& plan, std::int64_t row, int unroll) const {
    if (!active(plan) || row >= end) return 0;
    if (row + std::int64_t(unroll - 1) * lanes < end) return unroll;
    return static_cast<int>((end - row + lanes - 1) / lanes);
  }
  // How many rows of the split a lane takes.
  BNKERN_DEVICE int taken(int by_lane) const {
    const std::int64_t all = end - begin;
    return static_cast<int>(all / lanes) + (by_lane < all % lanes);
  }
};

// Calls f(tile, its first row, its valid rows) for a thread's tiles from `first` on, or from the last one down to it.
template <bool backwards, class F>
BNKERN_DEVICE void for_tiles(const RowsPlan& plan, const RowsCoord& coord, int first, int unroll, F f) {
  for (int i = first; i < plan.tiles; ++i) {
    const int tile = backwards ? plan.tiles - 1 - i + first : i;
    const std::int64_t row = coord.row(tile, unroll);
    f(tile, row, coord.valid_rows(plan, row, unroll));
  }
}

// The tiles that a single-read kernel holds in shared memory, `first` to plan.tiles_in_shared, each of kRows rows of
// kTensors tensors. Neighbouring threads have neighbouring octets.
template <class T, int kRows, int kTensors>
struct HeldTiles {
  Words* tiles;
  int first;
  BNKERN_DEVICE Octet<T>& operator()(int tile, int row, int tensor) const {
    const int octet = ((tile - first) * kRows + row) * kTensors + tensor;
    return reinterpret_cast<Octet<T>*>(tiles)[octet * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
  }
};

// Joins a block's threads: part(lane, pair) of each thread's pair of a channel, done(channel, sums).
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

// Joins the blocks of a group, once their parts are there: part(split, channel), done(channel of the group, sums).
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

// How many rows split k has.
BNKERN_DEVICE double rows_of(const RowsPlan& plan, int k) {
  const std::int64_t left = plan.rows - k * plan.rows_per_split;
  return static_cast<double>(left < plan.rows_per_split ? left : plan.rows_per_split);
}

// Whether all these can be read by octets.
inline bool by_octets(const Shape& shape, DType dtype, std::initializer_list<View> views) {
  const std::int64_t step = dtype == DType::kFloat32 ? 4 : 8;  // elements of 16 bytes
  return shape.c % 8 == 0 && std::all_of(views.begin(), views.end(), [&](const View& view) {
           return !view || (view.outer % step == 0 && reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0);
         });
}

// The partition of a call's rows, whether its kernels read octets, and whether one kernel does both phases.
struct RowsCut {
  RowsPlan plan;
  bool octets, single;
};
// `single`: both phases are requested, and one kernel may do them. Two kernels are simpler where far more must be read
// again than a block holds.
template <class T, int kTensors>
RowsCut cut_rows(const Shape& shape, const CudaDevice& device, bool octets, bool single) {
  constexpr int kTile = kUnroll<T, kTensors>;
  constexpr int kTileBytes = kTile * kTensors * 8 * static_cast<int>(sizeof(T));
  if (single && octets) {
    const RowsPlan plan = rows_plan(shape, device, true, octets, kTile, kTileBytes);
    if ((plan.tiles_in_shared + 1) * 8 >= plan.tiles) return {plan, octets, true};
  }
  return {rows_plan(shape, device, false, octets, kTile, kTileBytes), octets, false};
}

// The blocks of a kernel over flat octets.
inline dim3 flat_blocks(const Shape& shape, const CudaDevice& device) {
  const std::int64_t wanted = divide_up(divide_up(shape.n * shape.s * shape.c, 8), device.threads);
  return {static_cast<unsigned>(std::min<std::int64_t>(wanted, 8 * device.multiprocessors)), 1, 1};
}

// A thread's W neighbours, as stored.
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

// The sums of a thread's W channels that a record is made of. They live in shared memory, where no other thread looks
// at them until publish(): registers have no room for so many. add(j, sums) joins those of a few values of channel j.
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
  // The block's part: its lanes joined in their order. Called by all its threads.
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
