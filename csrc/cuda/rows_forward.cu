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

template <class T, int W>
BNKERN_DEVICE ThreadMoments<W> no_moments(const Forward& p, const RowsPlan& plan, const RowsCoord& coord) {
  ThreadMoments<W> none{};
  if (!coord.active(plan)) return none;
  const auto first = Vector<T, W>::load(static_cast<const T*>(p.x.data) + coord.begin * p.x.outer + coord.channel);
#pragma unroll
  for (int j = 0; j < W; ++j) none.pivot[j] = first[j];
  return none;
}

// Loads the first `valid_rows` rows of a tile. The other rows do not exist.
template <class T, int W, int UNROLL>
BNKERN_DEVICE void load_tile(Vector<T, W> (&tile)[UNROLL], const View& view, const RowsCoord& coord, std::int64_t row,
                             int valid_rows) {
  const T* p = static_cast<const T*>(view.data) + row * view.outer + coord.channel;
  const std::int64_t step = coord.lanes * view.outer;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u)
    if (u < valid_rows) tile[u] = Vector<T, W>::load(p + u * step);
}

template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_tile(ThreadMoments<W>* partial, const Vector<T, W> (&tile)[UNROLL], int valid_rows) {
  if (valid_rows == 0) return;
  const float n = static_cast<float>(valid_rows), count = partial->count + n;
  const float share = n / count, weight = partial->count * share, each = 1 / n;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    float distance[UNROLL], sum = 0, m2 = 0;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      distance[u] = u < valid_rows ? tile[u][j] - partial->pivot[j] : 0.0f;
      sum += distance[u];
    }
    const float mean = sum * each;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const float d = u < valid_rows ? distance[u] - mean : 0.0f;
      m2 = fma(d, d, m2);
    }
    chan_join(&partial->mean[j], &partial->m2[j], mean, m2, share, weight);
  }
  partial->count = count;
}

// Joins the block's threads and stores the block's part.
template <class T, int W>
BNKERN_DEVICE void publish_moments(const Forward& p, const RowsPlan& plan, const RowsCoord& coord,
                                   const RowsShared& shared, const Partials& parts, const ThreadMoments<W>& partial) {
#pragma unroll
  for (int j = 0; j < W; ++j) shared.pair(j, threadIdx.x) = {partial.mean[j], partial.m2[j]};
  join_threads<W>(
      plan, coord.group, shared,
      [&](int lane, const Pair& pair) {
        return pivot_sums({static_cast<double>(coord.taken(lane)), pair.first, pair.second});
      },
      [&](std::int64_t channel, PivotSums sums) {
        const Moments<double> all = moments_of(rows_of(plan, coord.split), sums);
        const T* const pivot = static_cast<const T*>(p.x.data) + coord.begin * p.x.outer + channel;
        parts.at(coord.split, channel) = {static_cast<float>(widen(*pivot) + all.mean), static_cast<float>(all.m2)};
      });
}

// Joins the parts of all blocks of a group, which must have written them. One thread calls done(c, moments) for each
// channel.
template <class Done>
BNKERN_DEVICE void join_moments(const RowsPlan& plan, int group, const RowsShared& shared, const Partials& parts,
                                Done done) {
  join_blocks(
      plan, group, shared,
      [&](int split, std::int64_t channel) {
        const Pair part = parts.at(split, channel), pivot = parts.at(0, channel);
        return pivot_sums({rows_of(plan, split), double(part.first) - pivot.first, part.second});
      },
      [&](int c, PivotSums sums) {
        Moments<double> all = moments_of(static_cast<double>(plan.rows), sums);
        all.mean += parts.at(0, std::int64_t(group) * plan.width + c).first;
        done(c, all);
      });
}

// Joins the parts of a group and saves its statistics. All threads of one block of each group call this.
BNKERN_DEVICE void finish_moments(const Forward& p, const RowsPlan& plan, int group, const RowsShared& shared,
                                  const Workspace& space) {
  const double momentum = momentum_of(p);
  join_moments(plan, group, shared, space.parts, [&](int c, const Moments<double>& all) {
    const std::int64_t channel = std::int64_t(group) * plan.width + c;
    save_statistics(p, channel, all, statistics_of(p, all), momentum);
  });
  update_counter(p, space, group, plan.groups);
}

template <class T, int W>
__global__ void __launch_bounds__(512, 1)
    rows_moments_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan, Workspace space) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, W);
  const RowsShared shared(plan.width);
  ThreadMoments<W> partial = no_moments<T, W>(p, plan, coord);
  for_tiles<false>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
    Vector<T, W> tile[kTile];
    load_tile(tile, p.x, coord, row, valid_rows);
    add_tile(&partial, tile, valid_rows);
  });
  publish_moments<T>(p, plan, coord, shared, space.parts, partial);
  if (last_of_blocks(space.arrivals + coord.group, plan.splits)) finish_moments(p, plan, coord.group, shared, space);
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

  BNKERN_DEVICE ActivationTally(std::size_t offset, const Forward& p, const RowsPlan& plan, const RowsCoord& coord,
                                const Affine (&coefficients)[W])
      : sums(offset), centre{} {
    if (!coord.active(plan)) return;
#pragma unroll
    for (int j = 0; j < W; ++j) centre[j] = centre_of<T>(p, plan, coord.channel + j, coefficients[j].mean);
  }
  // Adds a tile. Bit j of active[u] is whether value j of row u of y is above zero.
  template <int UNROLL>
  BNKERN_DEVICE void add(const Vector<T, W> (&x)[UNROLL], const unsigned (&active)[UNROLL], int valid_rows) const {
    if (valid_rows == 0) return;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      ActivationSums addend;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (u < valid_rows) addend.add(x[u][j], centre[j], active[u] >> j & 1);
      sums.add(j, addend);
    }
  }
  BNKERN_DEVICE void publish(const RowsPlan& plan, const RowsCoord& coord, const RecordParts& parts) const {
    sums.publish(plan, coord, parts);
    if (coord.split != 0 || coord.lane != 0 || !coord.active(plan)) return;
#pragma unroll
    for (int j = 0; j < W; ++j) parts.at(0, kCentre, coord.channel + j) = centre[j];
  }
};

// Writes y and the bytes of the mask for octets of rows from `row` on. For a record, `active` receives the bits of the
// values of y above zero.
template <class T, bool kRecord, int UNROLL>
BNKERN_DEVICE void write_tile(const Forward& p, const RowsCoord& coord, const Affine (&coefficients)[8],
                              const Vector<T, 8> (&tile)[UNROLL], std::int64_t row, int valid_rows,
                              unsigned (&active)[UNROLL]) {
  Vector<T, 8> residual[UNROLL];
  if (p.residual) load_tile(residual, p.residual, coord, row, valid_rows);
  T* const y = static_cast<T*>(p.y.data) + row * p.y.outer + coord.channel;
  const std::int64_t step = coord.lanes * p.y.outer;
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (u >= valid_rows) continue;
    float z[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      z[j] = normalized(tile[u][j], coefficients[j]);
      if (p.residual) z[j] += residual[u][j];
    }
    auto octet = Octet<T>::of(z);
    if (p.act != Activation::none) {
      const unsigned bits = activate(p.act, &octet);
      if (p.mask)
        p.mask[((row + std::int64_t(u) * coord.lanes) * p.shape.c + coord.channel) / 8] =
            static_cast<std::uint8_t>(bits);
    }
    octet.store(y + u * step);
    if constexpr (kRecord) {
      active[u] = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) active[u] |= unsigned(octet[j] > 0) << j;
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
  if (!kRecord && !coord.active(plan)) return;
  Affine coefficients[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (kRecord && !coord.active(plan)) break;
    const Statistics s = given_statistics(p, coord.channel + j);
    coefficients[j] = affine(p, coord.channel + j, s.mean, s.spread);
    if (!p.moments && p.running_mean && coord.split == 0 && coord.lane == 0) {
      static_cast<float*>(p.mean)[coord.channel + j] = s.mean;
      static_cast<float*>(p.spread)[coord.channel + j] = s.spread;
    }
  }
  const auto write_tiles = [&](auto then) {
    for_tiles<true>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
      Vector<T, 8> tile[kTile];
      unsigned active[kTile];
      load_tile(tile, p.x, coord, row, valid_rows);
      write_tile<T, kRecord>(p, coord, coefficients, tile, row, valid_rows, active);
      then(tile, active, valid_rows);
    });
  };
  if constexpr (kRecord) {
    const ActivationTally<T, 8> tally(0, p, plan, coord, coefficients);
    write_tiles([&](const auto& tile, const auto& active, int valid_rows) { tally.add(tile, active, valid_rows); });
    tally.publish(plan, coord, parts);
  } else {
    write_tiles([](const auto&, const auto&, int) {});
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
  const Affine coefficients[1] = {{coord.active(plan) ? given_statistics(p, coord.channel).mean : 0.0f, 0, 0, 0}};
  const ActivationTally<T, 1> tally(0, p, plan, coord, coefficients);
  for_tiles<false>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
    Vector<T, 1> x[kTile], y[kTile];
    unsigned active[kTile];
    load_tile(x, p.x, coord, row, valid_rows);
    load_tile(y, p.y, coord, row, valid_rows);
#pragma unroll
    for (int u = 0; u < kTile; ++u) active[u] = u < valid_rows && y[u][0] > 0;
    tally.add(x, active, valid_rows);
  });
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

// Both phases. A thread holds its first tile in registers and the next tiles in shared memory. It reads the tiles that
// do not fit a second time. The blocks of a group wait for each other at a barrier between the phases.
template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_forward_kernel(const __grid_constant__ Forward p, const __grid_constant__ RowsPlan plan, Workspace space,
                        RecordParts parts) {
  constexpr int kTile = kUnroll<T, 1>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 8);
  const RowsShared shared(plan.width);
  const HeldTiles<T, kTile, 1> held{shared.tiles, 1};
  ThreadMoments<8> partial = no_moments<T, 8>(p, plan, coord);
  Vector<T, 8> first[kTile];
  {
    const std::int64_t row = coord.row(0, kTile);
    const int valid_rows = coord.valid_rows(plan, row, kTile);
    load_tile(first, p.x, coord, row, valid_rows);
    add_tile(&partial, first, valid_rows);
  }
  for_tiles<false>(plan, coord, 1, kTile, [&](int t, std::int64_t row, int valid_rows) {
    Vector<T, 8> tile[kTile];
    load_tile(tile, p.x, coord, row, valid_rows);
    add_tile(&partial, tile, valid_rows);
    if (t > plan.tiles_in_shared) return;
#pragma unroll
    for (int u = 0; u < kTile; ++u)
      if (u < valid_rows) held(t, u, 0) = tile[u];
  });
  publish_moments<T>(p, plan, coord, shared, space.parts, partial);
  // Everything that does not depend on other blocks is read before the barrier. Thread t joins channel t of the group,
  // so it reads the weight and the bias of this channel here.
  const std::int64_t own = std::int64_t(coord.group) * plan.width + threadIdx.x;
  const bool joins = static_cast<int>(threadIdx.x) < plan.width && own < plan.channels, keeps = coord.split == 0;
  Affine of_own{};
  if (joins) of_own = affine(p, own, 0, 0);
  const double momentum = momentum_of(p);
  Moments<double> moments_of_own{};
  barrier_of_blocks(space.barriers + coord.group, plan.splits, keeps);
  join_moments(plan, coord.group, shared, space.parts, [&](int c, const Moments<double>& all) {
    const Statistics s = statistics_of(p, all);
    of_own.mean = s.mean, of_own.invstd = s.spread;
    shared.of_channel[c] = of_own;
    moments_of_own = all;
  });
  __syncthreads();
  if (keeps) {
    if (joins) save_statistics(p, own, moments_of_own, {of_own.mean, of_own.invstd}, momentum);
    update_counter(p, space, coord.group, plan.groups);
  }
  if (!kRecord && !coord.active(plan)) return;
  Affine coefficients[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) coefficients[j] = shared.of_channel[coord.column * 8 + j];
  const auto write_tiles = [&](auto then) {
    for_tiles<true>(plan, coord, 1, kTile, [&](int t, std::int64_t row, int valid_rows) {
      Vector<T, 8> tile[kTile];
      unsigned active[kTile];
      if (t > plan.tiles_in_shared) {
        load_tile(tile, p.x, coord, row, valid_rows);
      } else {
#pragma unroll
        for (int u = 0; u < kTile; ++u)
          if (u < valid_rows) tile[u] = {held(t, u, 0)};
      }
      write_tile<T, kRecord>(p, coord, coefficients, tile, row, valid_rows, active);
      then(tile, active, valid_rows);
    });
    const std::int64_t row = coord.row(0, kTile);
    const int valid_rows = coord.valid_rows(plan, row, kTile);
    unsigned active[kTile];
    write_tile<T, kRecord>(p, coord, coefficients, first, row, valid_rows, active);
    then(first, active, valid_rows);
  };
  if constexpr (kRecord) {
    const ActivationTally<T, 8> tally(shared_bytes(plan), p, plan, coord, coefficients);
    write_tiles([&](const auto& tile, const auto& active, int valid_rows) { tally.add(tile, active, valid_rows); });
    tally.publish(plan, coord, parts);
  } else {
    write_tiles([](const auto&, const auto&, int) {});
  }
}

template <class T>
RowsPlan plan_of(const CudaForward& p) {
  const Forward& call = p.call;
  const bool octets = by_octets(call.shape, call.dtype, {call.x, call.residual, call.y});
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
  const std::size_t tally = plan.octets ? tally_bytes<ActivationSums, 8>(plan) : tally_bytes<ActivationSums, 1>(plan);
  if (record)
    if (std::string why = make_room(&plan, tally, p.device); !why.empty()) return why;
  const dim3 blocks(plan.splits, plan.groups);
  const unsigned threads = plan.threads();
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.splits, stream) : error;
  };
  std::string error;
  if (plan.single) {
    const Launch settings{"normalize", blocks, threads, shared_bytes(plan) + (record ? tally : 0), stream};
    const auto kernel = record ? rows_forward_kernel<T, true> : rows_forward_kernel<T, false>;
    if (plan.splits == 1) return with_record(launch(settings, kernel, call, plan, space, records.activation));
    if (launch_resident(settings, &error, kernel, call, plan, space, records.activation)) return with_record(error);
  }
  if (call.moments) {
    const Launch settings{"moments", blocks, threads, RowsShared::fixed_bytes(plan.threads(), plan.width), stream};
    error = launch(settings, plan.octets ? rows_moments_kernel<T, 8> : rows_moments_kernel<T, 1>, call, plan, space);
  }
  if (!call.normalize || !error.empty()) return error;
  if (plan.octets) {
    const Launch settings{"normalize", blocks, threads, record ? tally : 0, stream};
    const auto kernel = record ? rows_normalize_kernel<T, true> : rows_normalize_kernel<T, false>;
    return with_record(launch(settings, kernel, call, plan, records.activation));
  }
  const Launch settings{"normalize", flat_blocks(call.shape, p.device), unsigned(p.device.threads), 0, stream};
  error = launch(settings, rows_normalize_flat_kernel<T>, call);
  if (error.empty() && record) {
    const Launch settings{"record", blocks, threads, tally, stream};
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
