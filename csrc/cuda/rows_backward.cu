// grad_sums and grad_input over rows: each alone, and both in one kernel. The one kernel reads the part of dy and x
// that fits on the chip only once.
#include "rows.h"

namespace bnkern {
namespace {

template <int W>
struct ThreadSums {
  float dy[W], dy_xhat[W];
};

// A tile of g, the gradient before the activation, and of x. load() sets g to dy, and mask() computes g from it.
template <class T, int W, int UNROLL>
struct GradientTile {
  Vector<T, W> g[UNROLL], x[UNROLL];

  BNKERN_DEVICE void load(const Backward& p, const RowsCoord& coord, std::int64_t row, int valid_rows) {
    const T* const dy_row = static_cast<const T*>(p.dy.data) + row * p.dy.outer + coord.channel;
    const T* const x_row = static_cast<const T*>(p.x.data) + row * p.x.outer + coord.channel;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= valid_rows) continue;
      g[u] = Vector<T, W>::load(dy_row + u * coord.lanes * p.dy.outer);
      x[u] = Vector<T, W>::load(x_row + u * coord.lanes * p.x.outer);
    }
  }
  BNKERN_DEVICE void mask(const Backward& p, const RowsCoord& coord, const Affine (&coefficients)[W], std::int64_t row,
                          int valid_rows) {
    if (p.act == Activation::none) return;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= valid_rows) continue;
      unsigned bits = 0;
      if (p.mask) {
        const std::int64_t bit = (row + std::int64_t(u) * coord.lanes) * p.shape.c + coord.channel;
        bits = p.mask[bit / 8] >> (W == 8 ? 0 : bit % 8);
      } else {
        bits = recomputed_mask<T>(x[u], coefficients);
      }
      if constexpr (W == 8)
        activate_gradient(p.act, &g[u], bits);
      else if (!(bits & 1))
        g[u].value = activate(p.act, g[u].value);
    }
  }
};

template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_tile(ThreadSums<W>* sums, const GradientTile<T, W, UNROLL>& tile,
                            const Affine (&coefficients)[W], int valid_rows) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (u >= valid_rows) continue;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float g = tile.g[u][j];
      sums->dy[j] += g;
      sums->dy_xhat[j] =
          fma(g, standardize(tile.x[u][j], coefficients[j].mean, coefficients[j].invstd), sums->dy_xhat[j]);
    }
  }
}

// The same with the record of the summands. It processes one channel after the other, so only the record's sums of one
// channel are in registers. The two sums have the same bits as without a record.
template <class T, int W, int UNROLL>
BNKERN_DEVICE void add_tile(ThreadSums<W>* sums, const Tally<AffineSums, W>& tally,
                            const GradientTile<T, W, UNROLL>& tile, const Affine (&coefficients)[W], int valid_rows) {
  if (valid_rows == 0) return;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    AffineSums addend;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      if (u >= valid_rows) continue;
      const float g = tile.g[u][j], xhat = standardize(tile.x[u][j], coefficients[j].mean, coefficients[j].invstd);
      sums->dy[j] += g;
      sums->dy_xhat[j] = fma(g, xhat, sums->dy_xhat[j]);
      addend.add(g, xhat);
    }
    tally.add(j, addend);
  }
}
// Adds a tile of dx, with its values as they are stored, to the record of dx.
template <class Values, int W, int UNROLL>
BNKERN_DEVICE void add_tile(const Tally<GradientSums, W>& tally, const Values (&dx)[UNROLL], int valid_rows) {
  if (valid_rows == 0) return;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    GradientSums addend;
#pragma unroll
    for (int u = 0; u < UNROLL; ++u)
      if (u < valid_rows) addend.add(dx[u][j]);
    tally.add(j, addend);
  }
}

template <int W>
BNKERN_DEVICE void read_affine(const Backward& p, const RowsPlan& plan, const RowsCoord& coord,
                               Affine (&coefficients)[W]) {
  if (!coord.active(plan)) return;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const std::int64_t c = coord.channel + j;
    coefficients[j] = affine(p, c, read(p.mean, c, 0.0f), read(p.invstd, c, 1.0f));
  }
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

// Adds up the parts of all blocks of a group, which must have written them. One thread calls done(c, sums) for each
// channel.
template <class Done>
BNKERN_DEVICE void join_sums(const RowsPlan& plan, int group, const RowsShared& shared, const Partials& parts,
                             Done done) {
  join_blocks(
      plan, group, shared,
      [&](int split, std::int64_t channel) {
        const Pair part = parts.at(split, channel);
        return PivotSums{part.first, part.second};
      },
      done);
}

template <class T, int W, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_grad_sums_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                          RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, W);
  const RowsShared shared(plan.width);
  Affine coefficients[W];
  read_affine(p, plan, coord, coefficients);
  ThreadSums<W> sums{};
  const auto add_tiles = [&](auto add) {
    for_tiles<false>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
      GradientTile<T, W, kTile> tile;
      tile.load(p, coord, row, valid_rows);
      tile.mask(p, coord, coefficients, row, valid_rows);
      add(tile, valid_rows);
    });
  };
  if constexpr (kRecord) {
    const Tally<AffineSums, W> tally(RowsShared::fixed_bytes(blockDim.x, plan.width));
    add_tiles([&](const auto& tile, int valid_rows) { add_tile(&sums, tally, tile, coefficients, valid_rows); });
    tally.publish(plan, coord, parts);
  } else {
    add_tiles([&](const auto& tile, int valid_rows) { add_tile(&sums, tile, coefficients, valid_rows); });
  }
  publish_sums(plan, coord, shared, space.parts, sums);
  if (!last_of_blocks(space.arrivals + coord.group, plan.splits)) return;
  join_sums(plan, coord.group, shared, space.parts, [&](int c, PivotSums all) {
    const std::int64_t channel = std::int64_t(coord.group) * plan.width + c;
    save_sums(p, channel, all);
    space.totals[channel] = means_of(p, all);
  });
}

// Writes dx and the gradient of the residual for octets of rows from `row` on. For a record, `dx` receives the octets.
template <class T, bool kRecord, int UNROLL>
BNKERN_DEVICE void write_tile(const Backward& p, const RowsCoord& coord, const Affine (&coefficients)[8],
                              const Pair (&centre)[8], const GradientTile<T, 8, UNROLL>& tile, std::int64_t row,
                              int valid_rows, Octet<T> (&dx)[UNROLL]) {
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (u >= valid_rows) continue;
    const std::int64_t own = row + std::int64_t(u) * coord.lanes;
    if (p.dx) {
      float d[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) d[j] = gradient_of_input(p, tile.g[u][j], tile.x[u][j], coefficients[j], centre[j]);
      const auto octet = Octet<T>::of(d);
      octet.store(static_cast<T*>(p.dx.data) + own * p.dx.outer + coord.channel);
      if constexpr (kRecord) dx[u] = octet;
    }
    if (p.dresidual) tile.g[u].store(static_cast<T*>(p.dresidual.data) + own * p.dresidual.outer + coord.channel);
  }
}

template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_grad_input_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                           RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, plan.splits - 1 - static_cast<int>(blockIdx.x), blockIdx.y, 8);
  if (!kRecord && !coord.active(plan)) return;
  Affine coefficients[8];
  Pair centre[8];
  read_affine(p, plan, coord, coefficients);
  if (coord.active(plan)) {
#pragma unroll
    for (int j = 0; j < 8; ++j) centre[j] = given_means(p, space.totals, coord.channel + j);
  }
  const auto write_tiles = [&](auto then) {
    for_tiles<true>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
      GradientTile<T, 8, kTile> tile;
      Octet<T> dx[kTile];
      tile.load(p, coord, row, valid_rows);
      tile.mask(p, coord, coefficients, row, valid_rows);
      write_tile<T, kRecord>(p, coord, coefficients, centre, tile, row, valid_rows, dx);
      then(dx, valid_rows);
    });
  };
  if constexpr (kRecord) {
    const Tally<GradientSums, 8> tally(0);
    write_tiles([&](const auto& dx, int valid_rows) { add_tile(tally, dx, valid_rows); });
    tally.publish(plan, coord, parts);
  } else {
    write_tiles([](const auto&, int) {});
  }
}

// Computes the record of tensors whose rows cannot be read by octets. rows_grad_input_flat_kernel writes dx of such
// tensors, and its threads do not have a fixed channel. So this kernel reads dx again.
template <class T>
__global__ void __launch_bounds__(512, 1)
    rows_gradient_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, RecordParts parts) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 1);
  const Tally<GradientSums, 1> tally(0);
  for_tiles<false>(plan, coord, 0, kTile, [&](int, std::int64_t row, int valid_rows) {
    Vector<T, 1> dx[kTile];
    const T* const first = static_cast<const T*>(p.dx.data) + row * p.dx.outer + coord.channel;
#pragma unroll
    for (int u = 0; u < kTile; ++u)
      if (u < valid_rows) dx[u] = Vector<T, 1>::load(first + std::int64_t(u) * coord.lanes * p.dx.outer);
    add_tile(tally, dx, valid_rows);
  });
  tally.publish(plan, coord, parts);
}

// For tensors whose rows cannot be read by octets. A thread processes eight consecutive elements regardless of their
// channels, because they have one byte of the mask.
template <class T>
__global__ void __launch_bounds__(512, 1)
    rows_grad_input_flat_kernel(const __grid_constant__ Backward p, Workspace space) {
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
        const float dx = gradient_of_input(p, widen(g), value, coefficients, given_means(p, space.totals, channel));
        static_cast<T*>(p.dx.data)[row * p.dx.outer + channel] = narrow<T>(dx);
      }
      if (p.dresidual) static_cast<T*>(p.dresidual.data)[row * p.dresidual.outer + channel] = g;
      if (++channel == c) channel = 0, ++row;
    }
  }
}

// Both phases. A thread holds its first tile in registers and the next tiles in shared memory. It reads the tiles that
// do not fit a second time. The blocks of a group wait for each other at a barrier between the phases.
template <class T, bool kRecord>
__global__ void __launch_bounds__(512, 1)
    rows_backward_kernel(const __grid_constant__ Backward p, const __grid_constant__ RowsPlan plan, Workspace space,
                         RecordSpace records) {
  constexpr int kTile = kUnroll<T, 2>;
  const RowsCoord coord(plan, blockIdx.x, blockIdx.y, 8);
  const RowsShared shared(plan.width);
  // The first tile is held in registers. With a record it is held in shared memory, because the record needs the
  // registers.
  constexpr int kFirst = kRecord ? 0 : 1;
  const HeldTiles<T, kTile, 2> held{shared.tiles, kFirst};  // tensor 0 is g, and tensor 1 is x
  Affine coefficients[8];
  read_affine(p, plan, coord, coefficients);
  ThreadSums<8> sums{};
  GradientTile<T, 8, kTile> first;
  const auto add_tiles = [&](auto add) {
    if constexpr (!kRecord) {
      const std::int64_t row = coord.row(0, kTile);
      const int valid_rows = coord.valid_rows(plan, row, kTile);
      first.load(p, coord, row, valid_rows);
      first.mask(p, coord, coefficients, row, valid_rows);
      add(first, valid_rows);
    }
    for_tiles<false>(plan, coord, kFirst, kTile, [&](int t, std::int64_t row, int valid_rows) {
      GradientTile<T, 8, kTile> tile;
      tile.load(p, coord, row, valid_rows);
      tile.mask(p, coord, coefficients, row, valid_rows);
      add(tile, valid_rows);
      if (t > plan.tiles_in_shared) return;
#pragma unroll
      for (int u = 0; u < kTile; ++u)
        if (u < valid_rows) held(t, u, 0) = tile.g[u], held(t, u, 1) = tile.x[u];
    });
  };
  if constexpr (kRecord) {
    const Tally<AffineSums, 8> tally(shared_bytes(plan) + std::size_t{blockDim.x} * plan.tile_bytes);
    add_tiles([&](const auto& tile, int valid_rows) { add_tile(&sums, tally, tile, coefficients, valid_rows); });
    if (records.affine.data) tally.publish(plan, coord, records.affine);
  } else {
    add_tiles([&](const auto& tile, int valid_rows) { add_tile(&sums, tile, coefficients, valid_rows); });
  }
  publish_sums(plan, coord, shared, space.parts, sums);
  PivotSums sums_of_own{};
  bool joins = false;
  barrier_of_blocks(space.barriers + coord.group, plan.splits, coord.split == 0);
  join_sums(plan, coord.group, shared, space.parts, [&](int c, PivotSums all) {
    const Pair means = means_of(p, all);
    shared.of_channel[c] = {means.first, means.second, 0, 0};
    sums_of_own = all, joins = true;
  });
  __syncthreads();
  if (joins && coord.split == 0) save_sums(p, std::int64_t(coord.group) * plan.width + threadIdx.x, sums_of_own);
  if (!kRecord && !coord.active(plan)) return;
  Pair centre[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const Affine means = shared.of_channel[coord.column * 8 + j];
    centre[j] = {means.mean, means.invstd};
  }
  const auto write_tiles = [&](auto then) {
    for_tiles<true>(plan, coord, kFirst, kTile, [&](int t, std::int64_t row, int valid_rows) {
      GradientTile<T, 8, kTile> tile;
      if (t > plan.tiles_in_shared) {
        tile.load(p, coord, row, valid_rows);
        tile.mask(p, coord, coefficients, row, valid_rows);
      } else {
#pragma unroll
        for (int u = 0; u < kTile; ++u)
          if (u < valid_rows) tile.g[u] = {held(t, u, 0)}, tile.x[u] = {held(t, u, 1)};
      }
      Octet<T> dx[kTile];
      write_tile<T, kRecord>(p, coord, coefficients, centre, tile, row, valid_rows, dx);
      then(dx, valid_rows);
    });
    if constexpr (!kRecord) {
      const std::int64_t row = coord.row(0, kTile);
      Octet<T> dx[kTile];
      write_tile<T, false>(p, coord, coefficients, centre, first, row, coord.valid_rows(plan, row, kTile), dx);
    }
  };
  if constexpr (kRecord) {
    const Tally<GradientSums, 8> tally(shared_bytes(plan) + std::size_t{blockDim.x} * plan.tile_bytes);
    const bool wanted = records.gradient.data != nullptr;
    write_tiles([&](const auto& dx, int valid_rows) {
      if (wanted) add_tile(tally, dx, valid_rows);
    });
    if (wanted) tally.publish(plan, coord, records.gradient);
  } else {
    write_tiles([](const auto&, int) {});
  }
}

template <class T>
RowsPlan plan_of(const CudaBackward& p) {
  const Backward& call = p.call;
  const bool octets = by_octets(call.shape, call.dtype, {call.dy, call.x, call.dx, call.dresidual});
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
  static_assert(int(kGradientRows) == int(kAffineRows), "one tally's room serves for both");
  const std::size_t first_tile = std::size_t(plan.threads()) * plan.tile_bytes;
  const std::size_t tally = plan.octets ? tally_bytes<AffineSums, 8>(plan) : tally_bytes<AffineSums, 1>(plan);
  if (record) {
    // If the one kernel has not enough shared memory for its record, two kernels with the same plan run instead. They
    // give the same bits.
    plan.single = plan.single && make_room(&plan, tally + first_tile, p.device).empty();
    if (std::string why = make_room(&plan, tally, p.device); !plan.single && !why.empty()) return why;
  }
  const dim3 blocks(plan.splits, plan.groups);
  const unsigned threads = plan.threads();
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.splits, stream) : error;
  };
  std::string error;
  if (plan.single) {
    const Launch settings{"grad_input", blocks, threads, shared_bytes(plan) + (record ? tally + first_tile : 0),
                          stream};
    const auto kernel = record ? rows_backward_kernel<T, true> : rows_backward_kernel<T, false>;
    if (plan.splits == 1) return with_record(launch(settings, kernel, call, plan, space, records));
    if (launch_resident(settings, &error, kernel, call, plan, space, records)) return with_record(error);
  }
  if (call.sums) {
    const std::size_t fixed = RowsShared::fixed_bytes(plan.threads(), plan.width);
    const Launch settings{"grad_sums", blocks, threads, fixed + (of_sums ? tally : 0), stream};
    const auto kernel = plan.octets
                            ? (of_sums ? rows_grad_sums_kernel<T, 8, true> : rows_grad_sums_kernel<T, 8, false>)
                            : (of_sums ? rows_grad_sums_kernel<T, 1, true> : rows_grad_sums_kernel<T, 1, false>);
    error = launch(settings, kernel, call, plan, space, records.affine);
  }
  if (call.input && error.empty()) {
    if (plan.octets) {
      const Launch settings{"grad_input", blocks, threads, of_input ? tally : 0, stream};
      const auto kernel = of_input ? rows_grad_input_kernel<T, true> : rows_grad_input_kernel<T, false>;
      error = launch(settings, kernel, call, plan, space, records.gradient);
    } else {
      const Launch settings{"grad_input", flat_blocks(call.shape, p.device), unsigned(p.device.threads), 0, stream};
      error = launch(settings, rows_grad_input_flat_kernel<T>, call, space);
      if (error.empty() && of_input) {
        const Launch again{"record", blocks, threads, tally, stream};
        error = launch(again, rows_gradient_kernel<T>, call, plan, records.gradient);
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
