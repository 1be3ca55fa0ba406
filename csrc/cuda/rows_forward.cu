// moments and normalize over rows: each alone, and both in one kernel. The one kernel reads the part of x that fits on
// the chip only once.
//
// The mean and M2 of a thread's tile are computed in two passes over its registers. Chan's formula joins them to those
// of the thread's previous tiles. All values are taken as distances from the first row of the block's split, so they
// are small numbers even if the mean is large. Threads and then blocks are joined in a fixed order.
#include "rows.h"

namespace bnkern {
namespace {

// The moments of the rows that a thread has read, for each of its channels. `mean` is relative to `pivot`.
template <int W>
struct ThreadMoments {
  float count, pivot[W], mean[W], m2[W];
};

// Loads the rows of a tile that exist.
template <class T, int W, int UNROLL>
BNKERN_DEVICE void load_tile(Vector<T, W> (&tile)[UNROLL], const View& view, const RowsCoord& coord, int number) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    const int row = coord.row<UNROLL>(number, u);
    if (row < coord.rows) tile[u] = Vector<T, W>::load(coord.address<const T>(view, row));
  }
}

template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_tile(ThreadMoments<W>* partial, const Vector<T, W> (&tile)[UNROLL], const RowsCoord& coord,
                            int number) {
  bool exists[UNROLL];
  int rows = 0;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) exists[u] = coord.row<UNROLL>(number, u) < coord.rows, rows += exists[u];
  if (rows == 0) return;
  float each = 1;
#pragma unroll
  for (int n = 2; n <= UNROLL; ++n)
    if (rows == n) each = 1.0f / static_cast<float>(n);
  const float n = static_cast<float>(rows), count = partial->count + n;
  const float share = divide_normal(n, count), weight = partial->count * share;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    float distance[UNROLL], sum = 0, m2 = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      distance[u] = exists[u] ? tile[u][j] - partial->pivot[j] : 0.0f;
      sum += distance[u];
    }
    const float mean = sum * each;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const float d = exists[u] ? distance[u] - mean : 0.0f;
      m2 = fma(d, d, m2);
    }
    chan_join(&partial->mean[j], &partial->m2[j], mean, m2, share, weight);
  }
  partial->count = count;
}

// The value to which the means of all parts are relative, for channel c of the group. These means are small numbers, so
// their rounding to float32 costs nothing even if the channel's mean is large. The channel's owner stores it before the
// first phase and is the only thread that reads it. The pivot of the split is beside it.
template <int W>
BNKERN_DEVICE float& origin(const RowsPlan& plan, const RowsShared& shared, int c) {
  return shared.means[place<W>(plan, c)].second;
}
template <class T, int W>
BNKERN_DEVICE void store_origin(const Forward& p, const RowsPlan& plan, int group, const RowsShared& shared) {
  const int owned = plan.chains.owned();
  if (owned < 0) return;
  const T* const first = static_cast<const T*>(p.x.data) + clamped_channel(plan, group, owned);
  origin<W>(plan, shared, owned) = middle_of([&](int k) { return widen(first[(plan.rows - 1) * k / 2 * p.x.outer]); });
}

// Computes the moments of a thread's rows. `tile` is the last tile afterwards, and `held` has the tiles before
// held.count. The loads of a tile are issued before the moments of the previous one are computed.
template <class T, int W, int UNROLL>
BNKERN_DEVICE ThreadMoments<W> moments_of_rows(const Forward& p, const RowsPlan& plan, const RowsCoord& coord,
                                               const RowsShared& shared, const HeldTiles<T, UNROLL, 1>& held,
                                               Vector<T, W> (&tile)[UNROLL]) {
  ThreadMoments<W> partial{};
  Vector<T, W> first{};
  if (coord.active) first = Vector<T, W>::load(coord.address<const T>(p.x, 0));
  load_tile(tile, p.x, coord, 0);
  store_origin<T, W>(p, plan, coord.group, shared);
#pragma unroll
  for (int j = 0; j < W; ++j) partial.pivot[j] = first[j];
#pragma unroll 1
  for (int t = 0;; ++t) {
    const bool last = t + 1 == plan.tiles;
    Vector<T, W> next[UNROLL];
    if (!last) load_tile(next, p.x, coord, t + 1);
    add_tile(&partial, tile, coord, t);
    if (last) return partial;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if constexpr (W == 8)
        if (t < held.count) held(t, u, 0) = tile[u];
      tile[u] = next[u];
    }
  }
}

// Joins the block's threads and stores the block's part.
template <int W>
BNKERN_DEVICE void publish_moments(const RowsPlan& plan, const RowsCoord& coord, const RowsShared& shared,
                                   const Partials& parts, const ThreadMoments<W>& partial) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    shared.pair(j, threadIdx.x) = {partial.mean[j], partial.m2[j]};
    if (coord.lane == 0) shared.means[j * plan.columns + coord.column].first = partial.pivot[j];
  }
  const RowsOfSplit rows = coord.last ? plan.of_last : plan.of_split;
  join_threads<W>(
      plan, coord.group, shared,
      [&](int lane, const Pair& pair) {
        return pivot_sums({rows.per_lane + (lane < rows.longer ? 1.0 : 0.0), pair.first, pair.second});
      },
      [&](std::int64_t channel, PivotSums sums) {
        const Moments<double> all = moments_of(rows.count, sums);
        const int c = static_cast<int>(channel - coord.group * plan.width);
        const double distance = double{shared.means[place<W>(plan, c)].first} - origin<W>(plan, shared, c);
        parts.at(coord.split, channel) = {static_cast<float>(distance + all.mean), static_cast<float>(all.m2)};
      });
}

// Joins the parts of all blocks of a group, which must have written them. The owner of a channel calls
// done(c, moments).
template <int W, class Done>
BNKERN_DEVICE void join_moments(const RowsPlan& plan, int group, const RowsShared& shared, const Partials& parts,
                                Done done) {
  join_blocks(
      plan, group, shared, parts,
      [&](int split, Pair part) {
        const double count = split == plan.splits - 1 ? plan.of_last.count.values : plan.of_split.count.values;
        return pivot_sums({count, part.first, part.second});
      },
      [&](int c, PivotSums sums) {
        Moments<double> all = moments_of(plan.all, sums);
        all.mean += origin<W>(plan, shared, c);
        done(c, all);
      });
}

// The state of the channel that this thread owns. If it owns none, only the counter and the momentum are valid.
BNKERN_DEVICE State state_of_owned(const Forward& p, const RowsPlan& plan, int group) {
  const int owned = plan.chains.owned();
  return read_state(p, clamped_channel(plan, group, owned < 0 ? 0 : owned));
}

template <class T, int W>
__global__ void __launch_bounds__(512, 1)
    rows_moments_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan, Workspace space) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, W);
  const RowsShared shared(plan);
  Vector<T, W> tile[kTile];
  const ThreadMoments<W> partial = moments_of_rows<T>(p, plan, coord, shared, {}, tile);
  publish_moments(plan, coord, shared, space.parts, partial);
  const State state = state_of_owned(p, plan, coord.group);
  if (!last_of_blocks(space.arrivals + coord.group, plan.splits)) return;
  join_moments<W>(plan, coord.group, shared, space.parts, [&](int c, const Moments<double>& all) {
    const std::int64_t channel = std::int64_t(coord.group) * plan.width + c;
    save_statistics(p, channel, plan.all, all, statistics_of(p, plan.all, all), state);
  });
  update_counter(p, space, state, coord.group, plan.groups);
}

// The value from which a record takes the distances of a channel's values. It is the mean of the batch if this call
// computes it, and otherwise the median of three values.
template <class T>
BNKERN_DEVICE float centre_of(const Forward& p, const RowsPlan& plan, std::int64_t channel, float mean) {
  if (p.moments) return mean;
  const T* const first = static_cast<const T*>(p.x.data) + channel;
  return middle_of([&](int k) { return widen(first[(plan.rows - 1) * k / 2 * p.x.outer]); });
}

// The record of x and y. It has the sums and the centres, which are also stored in the parts.
template <class T, int W>
struct ActivationTally {
  Tally<ActivationSums, W> sums;
  float centre[W];

  BNKERN_DEVICE ActivationTally(const Forward& p, const RowsPlan& plan, const RowsCoord& coord,
                                const Affine (&coefficients)[W])
      : sums(plan), centre{} {
    if (!coord.active) return;
#pragma unroll
    for (int j = 0; j < W; ++j) centre[j] = centre_of<T>(p, plan, coord.channel + j, coefficients[j].mean);
  }
  // Adds a tile. Bit j of active[u] is whether value j of row u of y is above zero.
  template <int UNROLL>
  BNKERN_DEVICE void add(const Vector<T, W> (&x)[UNROLL], const unsigned (&active)[UNROLL], const RowsCoord& coord,
                         int number) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      ActivationSums addend;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (coord.row<UNROLL>(number, u) < coord.rows) addend.add(x[u][j], centre[j], active[u] >> j & 1);
      if (!addend.finite()) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
          if (coord.row<UNROLL>(number, u) < coord.rows) addend.add_nonfinite(x[u][j]);
      }
      sums.add(j, addend);
    }
  }
  BNKERN_DEVICE void publish(const RowsPlan& plan, const RowsCoord& coord, const RecordParts& parts) const {
    sums.publish(plan, coord, parts);
    if (coord.split != 0 || coord.lane != 0 || !coord.active) return;
#pragma unroll
    for (int j = 0; j < W; ++j) parts.at(0, kCentre, coord.channel + j) = centre[j];
  }
};

// Writes y and its byte of the mask for the octet of one row. Returns the bits of the values of y above zero, for a
// record.
template <class T, bool kRecord>
BNKERN_DEVICE unsigned write_row(const Forward& p, const RowsCoord& coord, const Affine (&coefficients)[8],
                                 const Vector<T, 8>& x, const Vector<T, 8>& residual, int row) {
  unsigned bits = 0;
  const Octet<T> octet = normalized_octet<T>(p, coefficients, x, residual, &bits);
  if (p.mask) p.mask[((coord.begin + row) * p.shape.c + coord.channel) / 8] = static_cast<std::uint8_t>(bits);
  octet.store(coord.address<T>(p.y, row));
  unsigned active = 0;
  if constexpr (kRecord) {
#pragma unroll
    for (int j = 0; j < 8; ++j) active |= unsigned(octet[j] > 0) << j;
  }
  return active;
}

// Writes y of all tiles, from the last to the first. `tile` and `residual` are those of the last tile. A row of the
// next tile is loaded as soon as the one before it in the same registers is written.
template <class T, bool kRecord, int UNROLL, class Tally>
BNKERN_DEVICE void write_tiles(const Forward& p, const RowsPlan& plan, const RowsCoord& coord,
                               const HeldTiles<T, UNROLL, 1>& held, const Affine (&coefficients)[8],
                               Vector<T, 8> (&tile)[UNROLL], Vector<T, 8> (&residual)[UNROLL], const Tally& tally) {
#pragma unroll 1
  for (int t = plan.tiles - 1; t >= 0; --t) {
    const auto load_next = [&](int u) {
      const int row = coord.row<UNROLL>(t - 1, u);
      if (t == 0 || row >= coord.rows) return;
      if (t - 1 < held.count)
        tile[u] = {held(t - 1, u, 0)};
      else
        tile[u] = Vector<T, 8>::load(coord.address<const T>(p.x, row));
      if (p.residual) residual[u] = Vector<T, 8>::load(coord.address<const T>(p.residual, row));
    };
    unsigned active[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int row = coord.row<UNROLL>(t, u);
      if (row < coord.rows) active[u] = write_row<T, kRecord>(p, coord, coefficients, tile[u], residual[u], row);
      if constexpr (!kRecord) load_next(u);
    }
    if constexpr (kRecord) {
      tally.add(tile, active, coord, t);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) load_next(u);
    }
  }
}

// Blocks and tiles are visited in reverse order, because the data that the moments kernel read last is still in the
// second-level cache.
template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_normalize_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan, RecordParts parts) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, plan.splits - 1 - static_cast<int>(blockIdx.x), blockIdx.y, 8);
  const RowsShared shared(plan);
  Vector<T, 8> tile[kTile], residual[kTile];
  load_tile(tile, p.x, coord, plan.tiles - 1);
  if (p.residual) load_tile(residual, p.residual, coord, plan.tiles - 1);
  for_channels(plan, coord.group, [&](int c, std::int64_t channel) {
    const Statistics s = given_statistics(p, channel);
    shared.coefficients[place<8>(plan, c)] = affine(p, channel, s.mean, s.spread);
    if (!p.moments && p.running_mean && coord.split == 0) {
      static_cast<float*>(p.mean)[channel] = s.mean;
      static_cast<float*>(p.spread)[channel] = s.spread;
    }
  });
  __syncthreads();
  Affine coefficients[8];
  read_channels(plan, coord, shared.coefficients, coefficients);
  if constexpr (kRecord) {
    const ActivationTally<T, 8> tally(p, plan, coord, coefficients);
    write_tiles<T, true>(p, plan, coord, {}, coefficients, tile, residual, tally);
    tally.publish(plan, coord, parts);
  } else {
    write_tiles<T, false>(p, plan, coord, {}, coefficients, tile, residual, NoTally{});
  }
}

// Computes the record of tensors whose rows cannot be read by octets. rows_normalize_flat_kernel writes y of such
// tensors, and its threads do not have a fixed channel. So this kernel reads x and y again.
template <class T>
__global__ void __launch_bounds__(512, 1)
    rows_activation_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan,
                           RecordParts parts) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 1);
  const Affine coefficients[1] = {{coord.active ? given_statistics(p, coord.channel).mean : 0.0f, 0, 0, 0}};
  const ActivationTally<T, 1> tally(p, plan, coord, coefficients);
#pragma unroll 1
  for (int t = 0; t < plan.tiles; ++t) {
    Vector<T, 1> x[kTile], y[kTile];
    unsigned active[kTile];
    load_tile(x, p.x, coord, t);
    load_tile(y, p.y, coord, t);
#pragma unroll
    for (int u = 0; u < kTile; ++u) active[u] = coord.row<kTile>(t, u) < coord.rows && y[u][0] > 0;
    tally.add(x, active, coord, t);
  }
  tally.publish(plan, coord, parts);
}

// For tensors whose rows cannot be read by octets. A thread processes eight consecutive elements regardless of their
// channels, because they have one byte of the mask.
template <class T>
__global__ void __launch_bounds__(512, 1) rows_normalize_flat_kernel(const __grid_constant__ Forward p) {
  const std::int64_t c = p.shape.c, all = p.shape.n * p.shape.s * c;
  const std::int64_t thread = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const T* const x = static_cast<const T*>(p.x.data);
  const T* const residual = static_cast<const T*>(p.residual.data);
  T* const y = static_cast<T*>(p.y.data);
  if (!p.moments && p.running_mean)
    for (std::int64_t i = thread; i < c; i += std::int64_t(gridDim.x) * blockDim.x) {
      const Statistics s = given_statistics(p, i);
      static_cast<float*>(p.mean)[i] = s.mean;
      static_cast<float*>(p.spread)[i] = s.spread;
    }
  for (std::int64_t octet = thread; octet * 8 < all; octet += std::int64_t(gridDim.x) * blockDim.x) {
    std::int64_t row = octet * 8 / c, channel = octet * 8 % c;
    unsigned bits = 0;
    for (int j = 0; j < 8 && octet * 8 + j < all; ++j) {
      const Statistics s = given_statistics(p, channel);
      float z = normalized(widen(x[row * p.x.outer + channel]), affine(p, channel, s.mean, s.spread));
      if (residual) z += widen(residual[row * p.residual.outer + channel]);
      T stored = narrow<T>(z);
      if (p.act != Activation::none) {
        const bool bit = positive(widen(stored));
        bits |= unsigned(bit) << j;
        if (!bit) stored = activate(p.act, stored);
      }
      y[row * p.y.outer + channel] = stored;
      if (++channel == c) channel = 0, ++row;
    }
    if (p.mask) p.mask[octet] = static_cast<std::uint8_t>(bits);
  }
}

// Both phases. A thread holds its last tile in registers and as many others as fit in shared memory. It reads the tiles
// that do not fit a second time. The blocks of a group wait for each other at a barrier between the phases. Everything
// that does not depend on other blocks is loaded while the block waits.
template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_forward_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan, Workspace space,
                        RecordParts parts) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 8);
  const RowsShared shared(plan, kRecord ? recording_bytes<ActivationSums, 8>(plan) : RowsShared::fixed_bytes(plan));
  const HeldTiles<T, kTile, 1> held{shared.tiles, plan.tiles_in_shared};
  const bool saves = coord.split == 0;  // whether this block saves the statistics
  Vector<T, 8> tile[kTile], residual[kTile];
  const ThreadMoments<8> partial = moments_of_rows<T>(p, plan, coord, shared, held, tile);
  BlocksBarrier barrier(space.barriers + coord.group, plan.splits);
  publish_moments(plan, coord, shared, space.parts, partial);
  barrier.arrive(saves);
  if (p.residual) load_tile(residual, p.residual, coord, plan.tiles - 1);
  for_channels(plan, coord.group,
               [&](int c, std::int64_t channel) { shared.coefficients[place<8>(plan, c)] = affine(p, channel, 0, 0); });
  State state{};
  if (saves) state = state_of_owned(p, plan, coord.group);
  Moments<double> moments{};
  Statistics statistics{};
  barrier.wait();
  join_moments<8>(plan, coord.group, shared, space.parts, [&](int c, const Moments<double>& all) {
    statistics = statistics_of(p, plan.all, all);
    moments = all;
    Affine& coefficients = shared.coefficients[place<8>(plan, c)];
    coefficients.mean = statistics.mean, coefficients.invstd = statistics.spread;
  });
  __syncthreads();
  Affine coefficients[8];
  read_channels(plan, coord, shared.coefficients, coefficients);
  if (saves) {
    const int owned = plan.chains.owned();
    const std::int64_t channel = std::int64_t(coord.group) * plan.width + owned;
    if (owned >= 0 && channel < plan.channels) save_statistics(p, channel, plan.all, moments, statistics, state);
  }
  if constexpr (kRecord) {
    const ActivationTally<T, 8> tally(p, plan, coord, coefficients);
    write_tiles<T, true>(p, plan, coord, held, coefficients, tile, residual, tally);
    tally.publish(plan, coord, parts);
  } else {
    write_tiles<T, false>(p, plan, coord, held, coefficients, tile, residual, NoTally{});
  }
  if (saves) update_counter(p, space, state, coord.group, plan.groups);
}

template <class T>
RowsPlan plan_of(const CudaForward& p) {
  const Forward& call = p.call;
  const bool octets = can_read_octets(call.shape, call.dtype, {call.x, call.residual, call.y});
  const bool single = p.strategy == Strategy::kSingleRead && call.moments && call.normalize;
  return plan_rows<T, 1>(call.shape, p.device, octets, single);
}

template <class T>
std::string forward_as(const CudaForward& p, std::uintptr_t stream) {
  const Forward& call = p.call;
  RowsPlan plan = plan_of<T>(p);
  const Workspace space = lay_out(p.workspace, plan.splits, call.shape.c);
  const bool record = call.record && call.normalize;
  const RecordSpace records = record_space(call, p.workspace, plan.splits);
  const std::size_t fixed = RowsShared::fixed_bytes(plan);
  const std::size_t recording =
      plan.octets ? recording_bytes<ActivationSums, 8>(plan) : recording_bytes<ActivationSums, 1>(plan);
  if (record)
    if (std::string reason = make_room(&plan, recording, p.device); !reason.empty()) return reason;
  const dim3 blocks(plan.splits, plan.groups);
  const unsigned threads = plan.threads();
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.splits, stream) : error;
  };
  std::string error;
  if (plan.single) {
    const Launch settings{"normalize", blocks, threads, shared_bytes(plan, record ? recording : fixed), stream};
    const auto kernel = record ? rows_forward_kernel<T, true> : rows_forward_kernel<T, false>;
    if (plan.splits == 1) return with_record(launch(settings, kernel, call, plan, space, records.activation));
    if (launch_resident(settings, &error, kernel, call, plan, space, records.activation)) return with_record(error);
  }
  if (call.moments) {
    const Launch settings{"moments", blocks, threads, fixed, stream};
    error = launch(settings, plan.octets ? rows_moments_kernel<T, 8> : rows_moments_kernel<T, 1>, call, plan, space);
  }
  if (!call.normalize || !error.empty()) return error;
  if (plan.octets) {
    const Launch settings{"normalize", blocks, threads, record ? recording : RowsShared::channel_bytes(plan), stream};
    const auto kernel = record ? rows_normalize_kernel<T, true> : rows_normalize_kernel<T, false>;
    return with_record(launch(settings, kernel, call, plan, records.activation));
  }
  const Launch settings{"normalize", flat_blocks(call.shape, p.device), unsigned(p.device.threads), 0, stream};
  error = launch(settings, rows_normalize_flat_kernel<T>, call);
  if (error.empty() && record) {
    const Launch settings{"record", blocks, threads, recording, stream};
    error = launch(settings, rows_activation_kernel<T>, call, plan, records.activation);
  }
  return with_record(error);
}

}  // namespace

std::string rows_forward(const CudaForward& p, std::uintptr_t stream) {
  return with_half_or_float(p.call.dtype, [&](auto* t) { return forward_as<Pointee<decltype(t)>>(p, stream); });
}

WorkspaceSize rows_forward_workspace(const CudaForward& p) {
  return with_half_or_float(p.call.dtype, [&](auto* t) {
    const RowsPlan plan = plan_of<Pointee<decltype(t)>>(p);
    return workspace_size(plan.groups, plan.splits, p.call.shape.c, record_bytes(p.call, plan.splits));
  });
}

}  // namespace bnkern
