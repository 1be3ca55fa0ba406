// grad_sums and grad_input over rows: each alone, and both in one kernel. The one kernel reads the part of dy and x
// that fits on the chip only once.
#include "rows.h"

namespace bnkern {
namespace {

template <int W>
struct ThreadSums {
  float dy[W], dy_xhat[W];
};

// The rows of a tile of g, the gradient before the activation, and of x. load() sets g to dy and reads the mask with
// it. mask() computes g.
template <class T, int W, int UNROLL>
struct GradientTile {
  Vector<T, W> g[UNROLL], x[UNROLL];
  unsigned bits[UNROLL];  // of the saved mask

  BNKERN_DEVICE void load(const Backward& p, const RowsCoord& coord, int row, int u) {
    g[u] = Vector<T, W>::load(coord.address<const T>(p.dy, row));
    x[u] = Vector<T, W>::load(coord.address<const T>(p.x, row));
    if (p.act == Activation::none || !p.mask) return;
    const std::int64_t bit = (coord.begin + row) * p.shape.c + coord.channel;
    bits[u] = p.mask[bit / 8] >> (W == 8 ? 0 : bit % 8);
  }
  BNKERN_DEVICE void load_rows(const Backward& p, const RowsCoord& coord, int number) {
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int row = coord.row<UNROLL>(number, u);
      if (row < coord.rows) load(p, coord, row, u);
    }
  }
  BNKERN_DEVICE void mask(const Backward& p, const Affine (&coefficients)[W], int u) {
    if (p.act == Activation::none) return;
    const unsigned positive_bits = p.mask ? bits[u] : recomputed_mask<T>(x[u], coefficients);
    if constexpr (W == 8)
      activate_gradient(p.act, &g[u], positive_bits);
    else if (!(positive_bits & 1))
      g[u].value = activate(p.act, g[u].value);
  }
};

template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_row(ThreadSums<W>* sums, const GradientTile<T, W, UNROLL>& tile, const Affine (&coefficients)[W],
                           int u) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const float g = tile.g[u][j];
    sums->dy[j] += g;
    sums->dy_xhat[j] =
        fma(g, standardize(tile.x[u][j], coefficients[j].mean, coefficients[j].invstd), sums->dy_xhat[j]);
  }
}

// Adds the summands of a tile to the record of the parameters' gradients. It processes one channel after the other, so
// only the sums of one channel are in registers.
template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_tile(const Tally<AffineSums, W>& tally, const GradientTile<T, W, UNROLL>& tile,
                            const Affine (&coefficients)[W], const RowsCoord& coord, int number) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    AffineSums addend;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (coord.row<UNROLL>(number, u) >= coord.rows) continue;
      addend.add(tile.g[u][j], standardize(tile.x[u][j], coefficients[j].mean, coefficients[j].invstd));
    }
    tally.add(j, addend);
  }
}
// Adds a tile of dx, with its values as they are stored, to the record of dx.
template <class Values, int W, int UNROLL>
BNKERN_DEVICE void add_tile(const Tally<GradientSums, W>& tally, const Values (&dx)[UNROLL], const RowsCoord& coord,
                            int number) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    GradientSums addend;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (coord.row<UNROLL>(number, u) < coord.rows) addend.add(dx[u][j]);
    if (!addend.finite()) {
#pragma unroll
      for (int u = 0; u < UNROLL; ++u)
        if (coord.row<UNROLL>(number, u) < coord.rows) addend.add_nonfinite(dx[u][j]);
    }
    tally.add(j, addend);
  }
}

// Reads the coefficients of the group's channels. The loads of the first tile belong before it.
template <int W>
BNKERN_DEVICE void read_coefficients(const Backward& p, const RowsPlan& plan, const RowsCoord& coord,
                                     const RowsShared& shared, Affine (&coefficients)[W]) {
  for_channels(plan, coord.group, [&](int c, std::int64_t channel) {
    shared.coefficients[place<W>(plan, c)] =
        affine(p, channel, read(p.mean, channel, 0.0f), read(p.invstd, channel, 1.0f));
  });
  __syncthreads();
  read_channels(plan, coord, shared.coefficients, coefficients);
}

// Computes the sums of a thread's rows. `tile` has the loads of the first tile, and is the last tile with its mask
// applied afterwards. `held` has the tiles before held.count. A row of the next tile is loaded as soon as the
// one before it in the same registers is added.
template <class T, int W, int UNROLL, class Tally>
BNKERN_DEVICE ThreadSums<W> sums_of_rows(const Backward& p, const RowsPlan& plan, const RowsCoord& coord,
                                         const HeldTiles<T, UNROLL, 2>& held, const Affine (&coefficients)[W],
                                         GradientTile<T, W, UNROLL>& tile, const Tally& tally) {
  constexpr bool kRecord = !std::is_same_v<Tally, NoTally>;
  ThreadSums<W> sums{};
#pragma unroll 1
  for (int t = 0; t < plan.tiles; ++t) {
    const auto hold_and_load_next = [&](int u) {
      if (t + 1 == plan.tiles) return;
      if constexpr (W == 8)
        if (t < held.count) held(t, u, 0) = tile.g[u], held(t, u, 1) = tile.x[u];
      const int row = coord.row<UNROLL>(t + 1, u);
      if (row < coord.rows) tile.load(p, coord, row, u);
    };
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (coord.row<UNROLL>(t, u) < coord.rows) {
        tile.mask(p, coefficients, u);
        add_row(&sums, tile, coefficients, u);
      }
      if constexpr (!kRecord) hold_and_load_next(u);
    }
    if constexpr (kRecord) {
      add_tile(tally, tile, coefficients, coord, t);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) hold_and_load_next(u);
    }
  }
  return sums;
}

// Adds up the sums of the block's threads and stores the block's part.
template <int W>
BNKERN_DEVICE void publish_sums(const RowsPlan& plan, const RowsCoord& coord, const RowsShared& shared,
                                const Partials& parts, const ThreadSums<W>& sums) {
#pragma unroll
  for (int j = 0; j < W; ++j) shared.pair(j, threadIdx.x) = {sums.dy[j], sums.dy_xhat[j]};
  join_threads<W>(
      plan, coord.group, shared, [](int, const Pair& pair) { return PivotSums{pair.first, pair.second}; },
      [&](std::int64_t channel, PivotSums all) {
        parts.at(coord.split, channel) = {static_cast<float>(all.first), static_cast<float>(all.second)};
      });
}

// Adds up the parts of all blocks of a group, which must have written them. The owner of a channel calls done(c, sums).
template <class Done>
BNKERN_DEVICE void join_sums(const RowsPlan& plan, int group, const RowsShared& shared, const Partials& parts,
                             Done done) {
  join_blocks(plan, group, shared, parts, [](int, Pair part) { return PivotSums{part.first, part.second}; }, done);
}

template <class T, int W, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_grad_sums_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                          RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, W);
  const RowsShared shared(plan);
  GradientTile<T, W, kTile> tile;
  Affine coefficients[W];
  tile.load_rows(p, coord, 0);
  read_coefficients(p, plan, coord, shared, coefficients);
  ThreadSums<W> sums;
  if constexpr (kRecord) {
    const Tally<AffineSums, W> tally(plan);
    sums = sums_of_rows(p, plan, coord, {}, coefficients, tile, tally);
    tally.publish(plan, coord, parts);
  } else {
    sums = sums_of_rows(p, plan, coord, {}, coefficients, tile, NoTally{});
  }
  publish_sums(plan, coord, shared, space.parts, sums);
  if (!last_of_blocks(space.arrivals + coord.group, plan.splits)) return;
  join_sums(plan, coord.group, shared, space.parts, [&](int c, PivotSums all) {
    const std::int64_t channel = std::int64_t(coord.group) * plan.width + c;
    save_sums(p, channel, all);
    space.totals[channel] = means_of(plan.all, all);
  });
}

// Writes dx and the gradient of the residual for the octet of one row. Returns the octet of dx, for a record.
template <class T, int UNROLL>
BNKERN_DEVICE Octet<T> write_row(const Backward& p, const RowsCoord& coord, const Affine (&coefficients)[8],
                                 const Pair (&centre)[8], const GradientTile<T, 8, UNROLL>& tile, int row, int u) {
  Octet<T> dx{};
  if (p.dx) {
    float d[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) d[j] = gradient_of_input(p, tile.g[u][j], tile.x[u][j], coefficients[j], centre[j]);
    dx = Octet<T>::of(d);
    dx.store(coord.address<T>(p.dx, row));
  }
  if (p.dresidual) tile.g[u].store(coord.address<T>(p.dresidual, row));
  return dx;
}

// Writes the results of all tiles, from the last to the first. `tile` is the last tile. Its mask has been applied if
// kSingle, and then `held` has the tiles before held.count. A row of the next tile is loaded as soon as the
// one before it in the same registers is written.
template <bool kSingle, class T, int UNROLL, class Tally>
BNKERN_DEVICE void write_tiles(const Backward& p, const RowsPlan& plan, const RowsCoord& coord,
                               const RowsShared& shared, const HeldTiles<T, UNROLL, 2>& held, Affine (&coefficients)[8],
                               Pair (&centre)[8], GradientTile<T, 8, UNROLL>& tile, const Tally& tally) {
  constexpr bool kRecord = !std::is_same_v<Tally, NoTally>;
#pragma unroll 1
  for (int t = plan.tiles - 1; t >= 0; --t) {
    const auto load_next = [&](int u) {
      const int row = coord.row<UNROLL>(t - 1, u);
      if (t == 0 || row >= coord.rows) return;
      if (kSingle && t - 1 < held.count)
        tile.g[u] = {held(t - 1, u, 0)}, tile.x[u] = {held(t - 1, u, 1)};
      else
        tile.load(p, coord, row, u);
    };
    if constexpr (kRecord) {  // not kept in registers, which the record needs
      read_channels(plan, coord, shared.coefficients, coefficients);
      read_channels(plan, coord, shared.means, centre);
    }
    const bool masked = kSingle && (t + 1 == plan.tiles || t < held.count);
    Octet<T> dx[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int row = coord.row<UNROLL>(t, u);
      if (row < coord.rows) {
        if (!masked) tile.mask(p, coefficients, u);
        dx[u] = write_row(p, coord, coefficients, centre, tile, row, u);
      }
      if constexpr (!kRecord) load_next(u);
    }
    if constexpr (kRecord) {
      add_tile(tally, dx, coord, t);
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) load_next(u);
    }
  }
}

template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_grad_input_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                           RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, plan.splits - 1 - static_cast<int>(blockIdx.x), blockIdx.y, 8);
  const RowsShared shared(plan);
  GradientTile<T, 8, kTile> tile;
  Affine coefficients[8];
  Pair centre[8];
  tile.load_rows(p, coord, plan.tiles - 1);
  for_channels(plan, coord.group, [&](int c, std::int64_t channel) {
    shared.means[place<8>(plan, c)] = given_means(p, plan.all, space.totals, channel);
  });
  read_coefficients(p, plan, coord, shared, coefficients);
  read_channels(plan, coord, shared.means, centre);
  if constexpr (kRecord) {
    const Tally<GradientSums, 8> tally(plan);
    write_tiles<false, T, kTile>(p, plan, coord, shared, {}, coefficients, centre, tile, tally);
    tally.publish(plan, coord, parts);
  } else {
    write_tiles<false, T, kTile>(p, plan, coord, shared, {}, coefficients, centre, tile, NoTally{});
  }
}

// Computes the record of tensors whose rows cannot be read by octets. rows_grad_input_flat_kernel writes dx of such
// tensors, and its threads do not have a fixed channel. So this kernel reads dx again.
template <class T>
__global__ void __launch_bounds__(512, 1)
    rows_gradient_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 1);
  const Tally<GradientSums, 1> tally(plan);
#pragma unroll 1
  for (int t = 0; t < plan.tiles; ++t) {
    Vector<T, 1> dx[kTile];
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      const int row = coord.row<kTile>(t, u);
      if (row < coord.rows) dx[u] = Vector<T, 1>::load(coord.address<const T>(p.dx, row));
    }
    add_tile(tally, dx, coord, t);
  }
  tally.publish(plan, coord, parts);
}

// For tensors whose rows cannot be read by octets. A thread processes eight consecutive elements regardless of their
// channels, because they have one byte of the mask.
template <class T>
__global__ void __launch_bounds__(512, 1)
    rows_grad_input_flat_kernel(const __grid_constant__ Backward p, Count count, Workspace space) {
  const std::int64_t c = p.shape.c, all = p.shape.n * p.shape.s * c;
  const T* const dy = static_cast<const T*>(p.dy.data);
  const T* const x = static_cast<const T*>(p.x.data);
  for (std::int64_t octet = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; octet * 8 < all;
       octet += std::int64_t(gridDim.x) * blockDim.x) {
    std::int64_t row = octet * 8 / c, channel = octet * 8 % c;
    for (int j = 0; j < 8 && octet * 8 + j < all; ++j) {
      const Affine coefficients = affine(p, channel, read(p.mean, channel, 0.0f), read(p.invstd, channel, 1.0f));
      const float value = widen(x[row * p.x.outer + channel]);
      T g = dy[row * p.dy.outer + channel];
      if (p.act != Activation::none) {
        const bool bit = p.mask ? p.mask[octet] >> j & 1 : positive(widen(narrow<T>(normalized(value, coefficients))));
        if (!bit) g = activate(p.act, g);
      }
      if (p.dx) {
        const float dx =
            gradient_of_input(p, widen(g), value, coefficients, given_means(p, count, space.totals, channel));
        static_cast<T*>(p.dx.data)[row * p.dx.outer + channel] = narrow<T>(dx);
      }
      if (p.dresidual) static_cast<T*>(p.dresidual.data)[row * p.dresidual.outer + channel] = g;
      if (++channel == c) channel = 0, ++row;
    }
  }
}

// Both phases. A thread holds its last tile in registers and as many others as fit in shared memory. It reads the tiles
// that do not fit a second time. The blocks of a group wait for each other at a barrier between the phases.
template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_backward_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                         RecordSpace records) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 8);
  const RowsShared shared(plan, kRecord ? recording_bytes<GradientSums, 8>(plan) : RowsShared::fixed_bytes(plan));
  const HeldTiles<T, kTile, 2> held{shared.tiles, plan.tiles_in_shared};  // tensor 0 is g, and tensor 1 is x
  GradientTile<T, 8, kTile> tile;
  Affine coefficients[8];
  tile.load_rows(p, coord, 0);
  read_coefficients(p, plan, coord, shared, coefficients);
  ThreadSums<8> sums;
  if constexpr (kRecord) {
    const Tally<AffineSums, 8> tally(plan);
    sums = sums_of_rows(p, plan, coord, held, coefficients, tile, tally);
    if (records.affine.data)
      tally.publish(plan, coord, records.affine);
    else
      __syncthreads();  // publish_sums() uses the same memory
  } else {
    sums = sums_of_rows(p, plan, coord, held, coefficients, tile, NoTally{});
  }
  BlocksBarrier barrier(space.barriers + coord.group, plan.splits);
  publish_sums(plan, coord, shared, space.parts, sums);
  barrier.arrive(coord.split == 0);
  barrier.wait();
  join_sums(plan, coord.group, shared, space.parts, [&](int c, PivotSums all) {
    shared.means[place<8>(plan, c)] = means_of(plan.all, all);
    if (coord.split == 0) save_sums(p, std::int64_t(coord.group) * plan.width + c, all);
  });
  __syncthreads();
  Pair centre[8];
  read_channels(plan, coord, shared.means, centre);
  if constexpr (kRecord) {
    const Tally<GradientSums, 8> tally(plan);
    write_tiles<true, T, kTile>(p, plan, coord, shared, held, coefficients, centre, tile, tally);
    if (records.gradient.data) tally.publish(plan, coord, records.gradient);
  } else {
    write_tiles<true, T, kTile>(p, plan, coord, shared, held, coefficients, centre, tile, NoTally{});
  }
}

template <class T>
RowsPlan plan_of(const CudaBackward& p) {
  const Backward& call = p.call;
  const bool octets = can_read_octets(call.shape, call.dtype, {call.dy, call.x, call.dx, call.dresidual});
  const bool single = p.strategy == Strategy::kSingleRead && call.sums && call.input;
  return plan_rows<T, 2>(call.shape, p.device, octets, single);
}

template <class T>
std::string backward_as(const CudaBackward& p, std::uintptr_t stream) {
  const Backward& call = p.call;
  RowsPlan plan = plan_of<T>(p);
  const Workspace space = lay_out(p.workspace, plan.splits, call.shape.c);
  const RecordSpace records = record_space(call, p.workspace, plan.splits);
  const bool of_sums = records_affine(call), of_input = records_gradient(call), record = of_sums || of_input;
  static_assert(int(kGradientRows) >= int(kAffineRows), "the room for a record of dx serves for both");
  const std::size_t fixed = RowsShared::fixed_bytes(plan);
  const std::size_t recording =
      plan.octets ? recording_bytes<GradientSums, 8>(plan) : recording_bytes<GradientSums, 1>(plan);
  if (record) {
    // If a block of the one kernel does not have enough shared memory for the record, two kernels with the same plan
    // run instead. They give the same bits.
    plan.single = plan.single && make_room(&plan, recording, p.device).empty();
    if (std::string reason = make_room(&plan, recording, p.device); !plan.single && !reason.empty()) return reason;
  }
  const dim3 blocks(plan.splits, plan.groups);
  const unsigned threads = plan.threads();
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.splits, stream) : error;
  };
  std::string error;
  if (plan.single) {
    const Launch settings{"grad_input", blocks, threads, shared_bytes(plan, record ? recording : fixed), stream};
    const auto kernel = record ? rows_backward_kernel<T, true> : rows_backward_kernel<T, false>;
    if (plan.splits == 1) return with_record(launch(settings, kernel, call, plan, space, records));
    if (launch_resident(settings, &error, kernel, call, plan, space, records)) return with_record(error);
  }
  if (call.sums) {
    const Launch settings{"grad_sums", blocks, threads, of_sums ? recording : fixed, stream};
    const auto kernel = plan.octets
                            ? (of_sums ? rows_grad_sums_kernel<T, 8, true> : rows_grad_sums_kernel<T, 8, false>)
                            : (of_sums ? rows_grad_sums_kernel<T, 1, true> : rows_grad_sums_kernel<T, 1, false>);
    error = launch(settings, kernel, call, plan, space, records.affine);
  }
  if (call.input && error.empty()) {
    if (plan.octets) {
      const Launch settings{"grad_input", blocks, threads, of_input ? recording : RowsShared::channel_bytes(plan),
                            stream};
      const auto kernel = of_input ? rows_grad_input_kernel<T, true> : rows_grad_input_kernel<T, false>;
      error = launch(settings, kernel, call, plan, space, records.gradient);
    } else {
      const Launch settings{"grad_input", flat_blocks(call.shape, p.device), unsigned(p.device.threads), 0, stream};
      error = launch(settings, rows_grad_input_flat_kernel<T>, call, plan.all, space);
      if (error.empty() && of_input) {
        const Launch record_settings{"record", blocks, threads, recording, stream};
        error = launch(record_settings, rows_gradient_kernel<T>, call, plan, records.gradient);
      }
    }
  }
  return with_record(error);
}

}  // namespace

std::string rows_backward(const CudaBackward& p, std::uintptr_t stream) {
  return with_half_or_float(p.call.dtype, [&](auto* t) { return backward_as<Pointee<decltype(t)>>(p, stream); });
}

WorkspaceSize rows_backward_workspace(const CudaBackward& p) {
  return with_half_or_float(p.call.dtype, [&](auto* t) {
    const RowsPlan plan = plan_of<Pointee<decltype(t)>>(p);
    return workspace_size(plan.groups, plan.splits, p.call.shape.c, record_bytes(p.call, plan.splits));
  });
}

}  // namespace bnkern
