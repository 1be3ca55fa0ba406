// The plan of a tensor in row layout, [M, C] with adjacent channels: how it is divided among blocks and threads.
//
// A block processes a group of channels and a split of the rows, which is `rows_per_split` consecutive rows. Its
// threads form lanes of `columns` threads each. A thread processes the W channels of its column (8 or 1), so it can
// keep their sums, and every lanes-th row of the split. A tile of a thread is UNROLL of its rows. All loads of a tile
// are issued before the first value is used. A kernel that uses the rows of a tile one after the other loads each row
// of the next tile into the same registers as soon as they are free. So the next tile needs no registers of its own.
//
// W = 8 requires that C is a multiple of 8, and that strides and addresses are multiples of 16 bytes. Other tensors are
// read one element at a time. Their elementwise results are written by threads that process eight consecutive elements
// regardless of their channels, because such an octet has its own byte of the mask.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "records.h"
#include "statistics.h"

namespace bnkern {

// The rows of one split, and how many of them the lanes of a block process.
struct RowsOfSplit {
  Count count;
  int rows, longer;  // the first `longer` lanes have one row more than per_lane
  double per_lane;
};

struct RowsPlan {
  bool octets, single;  // whether threads read octets, and whether one kernel computes both phases
  std::int64_t rows, rows_per_split;
  Count all;                      // of the rows
  RowsOfSplit of_split, of_last;  // of every split but the last one, and of the last one
  int channels, width;            // width: the channels of a group; the last group may have fewer
  int columns, lanes;             // a block has columns * lanes threads
  Divider lane;                   // by columns: the lane of a thread
  Chains chains;                  // for `width` channels
  int groups, splits;             // the grid has splits x groups blocks
  int tiles, tiles_in_shared;     // of a thread; a single-read kernel also holds the last tile, in registers
  int tile_bytes;                 // the size of a thread's tile

  BNKERN_HD int threads() const { return columns * lanes; }
};

// The number of rows in a thread's tile. With 8 channels it has 64 bytes of one tensor, or 32 bytes of each of two.
template <class T, int tensors>
constexpr int kUnroll = 16 / static_cast<int>(sizeof(T)) / 2 / tensors;

// In the two-kernel strategy a multiprocessor has two blocks of 256 threads. They are resident at once, because kernels
// are compiled for 512 threads, which limits them to 128 registers. So there is one wave of blocks.
constexpr int kBlocksPerProcessor = 2;
constexpr int kGroupOctets = 8;                 // the largest group: 128 bytes of half-precision channels
constexpr int kGroupElements = 64;              // the same for channels that are read one at a time
constexpr std::int64_t kFewPartials = 4 << 10;  // bytes of parts that every block may read at little cost

// The shared memory of a block: coefficients and means of its channels, scratch memory of sum_over_block(), the pairs
// of sums of its threads, and tiles. Kernels without sums use the first two only. A record (Tally) is never in use
// together with scratch and pairs, so it begins at `scratch`. If it is larger than both, the tiles are behind it.
struct RowsShared {
  Affine* coefficients;  // [8, columns] or [columns]: neighbouring columns are adjacent, and so use different banks
  Pair* means;           // the same
  PivotSums* scratch;
  Pair* pairs;  // [W, threads + 2]
  Words* tiles;

  // The bytes before `scratch`, and those before `tiles`.
  static BNKERN_HD std::size_t channel_bytes(const RowsPlan& plan) {
    return (plan.width * (sizeof(Affine) + sizeof(Pair)) + 15) / 16 * 16;
  }
  static BNKERN_HD std::size_t fixed_bytes(const RowsPlan& plan) {
    return channel_bytes(plan) + Chains::scratch(plan.threads()) * sizeof(PivotSums) +
           (plan.threads() + 2) * 8 * sizeof(Pair);
  }
  BNKERN_DEVICE explicit RowsShared(const RowsPlan& plan) : RowsShared(plan, fixed_bytes(plan)) {}
  BNKERN_DEVICE RowsShared(const RowsPlan& plan, std::size_t before_tiles) {
    coefficients = shared_memory<Affine>();
    means = shared_memory<Pair>(plan.width * sizeof(Affine));
    scratch = shared_memory<PivotSums>(channel_bytes(plan));
    pairs = shared_memory<Pair>(channel_bytes(plan) + Chains::scratch(plan.threads()) * sizeof(PivotSums));
    tiles = shared_memory<Words>(before_tiles);
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
  plan.lane = Divider::of(plan.columns);
  plan.chains = Chains::of(plan.width, plan.threads());
  plan.all = Count::of(plan.rows);
  const auto of_split = [&](std::int64_t rows) {
    return RowsOfSplit{Count::of(rows), static_cast<int>(rows), static_cast<int>(rows % plan.lanes),
                       static_cast<double>(rows / plan.lanes)};
  };
  plan.of_split = of_split(plan.rows_per_split);
  plan.of_last = of_split(plan.rows - (plan.splits - 1) * plan.rows_per_split);
  if (single) {
    const std::int64_t room = device.shared_bytes - static_cast<std::int64_t>(RowsShared::fixed_bytes(plan));
    const std::int64_t fit = std::max<std::int64_t>(0, room / (plan.threads() * tile_bytes));
    plan.tiles_in_shared = static_cast<int>(std::min<std::int64_t>(fit, plan.tiles - 1));
  }
  return plan;
}
inline std::size_t shared_bytes(const RowsPlan& plan, std::size_t before_tiles) {
  return before_tiles + static_cast<std::size_t>(plan.tiles_in_shared) * plan.threads() * plan.tile_bytes;
}

// The number of floats of a thread for a record. They are adjacent, so one base address serves all of them. The
// distance between two threads is an odd number of words, so neighbouring threads use different banks.
template <class Sums, int W>
constexpr int kTallySize = static_cast<int>(sizeof(Sums) / sizeof(float)) * W | 1;
// The bytes before `tiles` in a block that computes a record.
template <class Sums, int W>
BNKERN_HD std::size_t recording_bytes(const RowsPlan& plan) {
  const std::size_t sums = std::size_t{kTallySize<Sums, W>} * plan.threads() * sizeof(float);
  const std::size_t bytes = (RowsShared::channel_bytes(plan) + sums + 15) / 16 * 16;
  const std::size_t fixed = RowsShared::fixed_bytes(plan);
  return bytes < fixed ? fixed : bytes;
}

// Makes room for a record in the shared memory of a block, which may then hold fewer tiles. Nothing else of the plan
// changes, so the bits stay the same. Returns "" or the reason why there is not enough memory.
inline std::string make_room(RowsPlan* plan, std::size_t before_tiles, const CudaDevice& device) {
  const std::int64_t fixed = static_cast<std::int64_t>(before_tiles);
  const std::int64_t room = device.shared_bytes - fixed, tile = plan->threads() * plan->tile_bytes;
  if (room < 0)
    return "record: a block needs " + std::to_string(fixed) + " bytes of shared memory, the device gives it " +
           std::to_string(device.shared_bytes);
  plan->tiles_in_shared = static_cast<int>(std::min<std::int64_t>(plan->tiles_in_shared, room / tile));
  return {};
}

// The channels and rows of a thread. Rows are counted from the first one of the split.
struct RowsCoord {
  int split, group, lane, column;
  std::int64_t channel;  // the first of its W channels; active is false if it does not exist
  bool active, last;     // last: whether this is the last split
  int rows;              // of the split; 0 if the thread is not active
  std::int64_t begin;    // the first row of the split
  int lanes;

  BNKERN_DEVICE RowsCoord(const RowsPlan& plan, int split, int group, int per_thread)
      : split(split),
        group(group),
        lane(static_cast<int>(plan.lane.divide(threadIdx.x))),
        last(split == plan.splits - 1),
        begin(split * plan.rows_per_split),
        lanes(plan.lanes) {
    column = static_cast<int>(threadIdx.x) - lane * plan.columns;
    channel = std::int64_t(group) * plan.width + column * per_thread;
    active = channel < plan.channels;
    rows = last ? plan.of_last.rows : plan.of_split.rows;
    if (!active) rows = 0;
  }
  // Row u of a tile of UNROLL rows. It exists if it is less than `rows`.
  template <int UNROLL>
  BNKERN_DEVICE int row(int tile, int u) const {
    return (tile * UNROLL + u) * lanes + lane;
  }
  template <class T>
  BNKERN_DEVICE T* address(const View& view, int row) const {
    return static_cast<T*>(view.data) + (begin * view.outer + channel) + row * view.outer;
  }
};

// The tiles that a single-read kernel holds in shared memory, those before `count`. Each has kRows rows of kTensors
// tensors. The octets of neighbouring threads are adjacent. A kernel of one phase holds none, also if its plan is that
// of a single-read kernel.
template <class T, int kRows, int kTensors>
struct HeldTiles {
  Words* tiles = nullptr;
  int count = 0;
  BNKERN_DEVICE Octet<T>& operator()(int tile, int row, int tensor) const {
    const int octet = (tile * kRows + row) * kTensors + tensor;
    return reinterpret_cast<Octet<T>*>(tiles)[octet * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
  }
};

// Calls set(c, channel) in one thread for each channel of the group. After a barrier of the block, the coefficients or
// means of all channels are in shared memory: one thread reads a vector's value for all threads of the channel.
template <class Set>
BNKERN_DEVICE void for_channels(const RowsPlan& plan, int group, Set set) {
  const std::int64_t channel = std::int64_t(group) * plan.width + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < plan.width && channel < plan.channels)
    set(static_cast<int>(threadIdx.x), channel);
}
// The index of channel c of a group in RowsShared::coefficients and means, and the values of a thread's channels.
template <int W>
BNKERN_DEVICE int place(const RowsPlan& plan, int c) {
  return c % W * plan.columns + c / W;
}
template <class A, int W>
BNKERN_DEVICE void read_channels(const RowsPlan& plan, const RowsCoord& coord, const A* from, A (&to)[W]) {
#pragma unroll
  for (int j = 0; j < W; ++j) to[j] = from[j * plan.columns + coord.column];
}

// Joins the pairs of a block's threads. convert(lane, pair) converts a thread's pair to sums that can be added. The
// owner of a channel calls done(channel, sums).
template <int W, class Convert, class Done>
BNKERN_DEVICE void join_threads(const RowsPlan& plan, int group, const RowsShared& shared, Convert convert, Done done) {
  const std::int64_t first = std::int64_t(group) * plan.width;
  __syncthreads();
  sum_over_block(
      plan.chains, plan.lanes, shared.scratch,
      [&](int lane, int c) { return shared.pair(c % W, lane * plan.columns + c / W); }, convert,
      [&](int c, PivotSums sums) {
        if (first + c < plan.channels) done(first + c, sums);
      });
}

// Channel c of a group, or the tensor's last channel if that does not exist.
BNKERN_DEVICE int clamped_channel(const RowsPlan& plan, int group, int c) {
  const int channel = group * plan.width + c;
  return channel < plan.channels ? channel : plan.channels - 1;
}

// Joins the parts of the blocks of a group. All blocks must have written them. convert(split, part) converts a part to
// sums that can be added. The owner of a channel calls done(channel within the group, sums).
template <class Convert, class Done>
BNKERN_DEVICE void join_blocks(const RowsPlan& plan, int group, const RowsShared& shared, const Partials& parts,
                               Convert convert, Done done) {
  const Pair* const first = parts.data + clamped_channel(plan, group, plan.chains.channel());
  // There are less than 2^31 parts, because there are at most some blocks for each multiprocessor or group.
  sum_over_block(
      plan.chains, plan.splits, shared.scratch,
      [&](int split, int) { return load_pair(first + split * plan.channels); }, convert,
      [&](int c, PivotSums sums) {
        if (group * plan.width + c < plan.channels) done(c, sums);
      });
}

// Whether octets of all these views can be loaded at once. Null views are ignored.
inline bool can_read_octets(const Shape& shape, DType dtype, std::initializer_list<View> views) {
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
  const std::int64_t blocks = divide_up(divide_up(shape.n * shape.s * shape.c, 8), device.threads);
  return {static_cast<unsigned>(std::min<std::int64_t>(blocks, 8 * device.multiprocessors)), 1, 1};
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

// The sums of a record for a thread's W channels. They are in shared memory, because there are not enough registers,
// from RowsShared::scratch on. No other thread reads them before publish(). add(j, sums) joins the sums of a few values
// of channel j. A barrier of the block belongs between the last add() and the next use of scratch and pairs; publish()
// ends with one.
template <class Sums, int W>
struct Tally {
  float* sums;

  BNKERN_DEVICE explicit Tally(const RowsPlan& plan)
      : sums(shared_memory<float>(RowsShared::channel_bytes(plan)) + threadIdx.x * kTallySize<Sums, W>) {
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
      const float* const from = sums + (c / W - static_cast<int>(threadIdx.x)) * kTallySize<Sums, W> + row * W + c % W;
      double all = from[0];
#pragma unroll 8
      for (int lane = 1; lane < plan.lanes; ++lane)
        all = joined<Sums, double>(row, from[lane * plan.columns * kTallySize<Sums, W>], all);
      parts.at(coord.split, row, first + c) = all;
    }
    __syncthreads();
  }

 private:
  static constexpr int kRows = sizeof(Sums) / sizeof(float);
  BNKERN_DEVICE float& at(int row, int j) const { return sums[row * W + j]; }
};

struct NoTally {};  // for kernels without records

}  // namespace bnkern
