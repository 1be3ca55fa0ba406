// moments and normalize over planes: each alone, and both in one launch. The one launch reads the part of x that fits
// on the chip only once.
//
// The moments of a thread's tile are computed in two passes over its registers, relative to one value of the channel,
// the pivot. Chan's formula joins them, first over the thread's tiles in order, then by trees over lanes, warps and
// parts. If both phases are one launch, the parts of a channel are a cluster, whose blocks read each other's partial
// results. Otherwise the last block of a channel to arrive joins the parts. The trees are the same, and so are the
// bits.
//
// Every CUDA build compiles this file, and the tests run it on the host.
#include "planes.h"

namespace bnkern {
namespace {

template <class T>
BNKERN_DEVICE float pivot_of(const View& x, const Shape& shape) {
  return middle_of([&](int k) {
    const std::int64_t n = k == 0 ? 0 : k == 1 ? shape.n / 2 : shape.n - 1;
    const std::int64_t s = k == 0 ? 0 : k == 1 ? shape.s / 2 : shape.s - 1;
    return widen(static_cast<const T*>(x.data)[n * x.outer + s]);
  });
}

// Computes the moments of the tile's values relative to `pivot`, and joins them to `total`.
template <class T, bool kWide>
BNKERN_DEVICE void add_tile(Moments<float>& total, const Tile<T, kWide>& tile, const OctetCoords<T, kWide>& coords,
                            float pivot) {
  float sum = 0;
  int count = 0;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float d[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) d[j] = exists<T, kWide>(coords.of[u], j) ? tile.octets[u][j] - pivot : 0.0f;
    sum += ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]));
    count += coords.of[u].elements;
  }
  const float mean = count == 0 ? 0 : sum * divide_normal(1, static_cast<float>(count));
  float squares[2] = {0, 0};
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = exists<T, kWide>(coords.of[u], j) ? (tile.octets[u][j] - pivot) - mean : 0.0f;
      squares[j % 2] = fma(d, d, squares[j % 2]);
    }
  total = merged(total, {static_cast<float>(count), mean, squares[0] + squares[1]});
}

// Computes the moments of a thread's tiles. `x` is the last tile afterwards, and shared memory has those that are held.
// The loads of a tile are issued before the moments of the previous one are computed. Reads the pivot.
template <bool kSingle, class T, bool kWide>
BNKERN_DEVICE Moments<float> moments_of_tiles(const Forward& p, const Planes& planes, int part, Tile<T, kWide>& x,
                                              float& pivot) {
  OctetCoords<T, kWide> coords(planes, part, 0);
  if constexpr (kWide) x.load(p.x, planes.step, coords);
  pivot = pivot_of<T>(p.x, p.shape);
  Moments<float> total{0, 0, 0};
#pragma unroll 1
  for (int tile = 0;; ++tile) {
    const bool last = tile + 1 == planes.tiles;
    const OctetCoords<T, kWide> next_coords(planes, part, tile + 1);
    Tile<T, kWide> next;
    if constexpr (!kWide)
      x.load(p.x, planes.step, coords);
    else if (!last)
      next.load(p.x, planes.step, next_coords);
    add_tile(total, x, coords, pivot);
    if (last) return total;
    if (kSingle && planes.shared(tile)) {
#pragma unroll
      for (int u = 0; u < kOctets<T>; ++u) x.hold(tile, u);
    }
    if constexpr (kWide) x = next;
    coords = next_coords;
  }
}

// The number of values of a part.
template <class T>
BNKERN_DEVICE float count_of(const Planes& planes, int part) {
  const auto before = [&](int parts) {
    const std::uint64_t all = std::uint64_t(parts) * planes.tiles * kOctets<T> * blockDim.x;
    const std::uint32_t octet = all < planes.octets ? static_cast<std::uint32_t>(all) : planes.octets;
    const std::uint32_t n = planes.per_plane.divide(octet);
    const std::int64_t rest = std::int64_t(octet - n * planes.per_plane.divisor) * 8;
    return n * planes.length + (rest < planes.length ? rest : planes.length);
  };
  return static_cast<float>(before(part + 1) - before(part));
}

// Joins all parts of a channel. published(k) returns (mean, M2) of part k, with the mean relative to the pivot. All
// threads of the first warp must call it, and the first thread has the result.
template <class T, class F>
BNKERN_DEVICE Moments<double> merge_parts(const Planes& planes, float pivot, F published) {
  Moments<float> total{0, 0, 0};
  for (int part = threadIdx.x; part < planes.parts; part += 32) {
    const Pair moments = published(part);
    total = merged(total, {count_of<T>(planes, part), moments.first, moments.second});
  }
  total = merge_warp(total);
  return {planes.count.values, static_cast<double>(pivot) + total.mean, total.m2};
}

// Computes and writes octet u of y and its byte of the mask. `y` receives the values as they are stored.
template <class T, bool kWide>
BNKERN_DEVICE void write_octet(const Forward& p, const Planes& planes, const OctetCoord& coord, const Tile<T, kWide>& x,
                               const Tile<T, kWide>& residual, const Affine& coefficients, Tile<T, kWide>& y, int u) {
  float z[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) z[j] = normalized(x.octets[u][j], coefficients);
  if (p.residual) {
#pragma unroll
    for (int j = 0; j < 8; ++j) z[j] += residual.octets[u][j];
  }
  y.octets[u] = Octet<T>::of(z);
  if (p.act != Activation::none) {
    const unsigned bits = activate(p.act, &y.octets[u]) & ((1u << coord.elements) - 1);
    if (p.mask && coord.elements) p.mask[mask_byte(planes, coord)] = static_cast<std::uint8_t>(bits);
  }
  y.store(p.y, planes.step, coord, u);
}

// Writes y of all tiles, from the last to the first. In a wide kernel `x` and `residual` are those of the last tile,
// and an octet of the next tile is loaded as soon as the one before it in the same registers is written. A narrow
// kernel loads a tile where it is used, because a second copy of its loads would be long. If it computes both phases,
// `x` is the last tile. For a record, record_tile(coords, y) adds a tile.
template <bool kSingle, bool kRecord, class T, bool kWide, class RecordTile>
BNKERN_DEVICE void write_tiles(const Forward& p, const Planes& planes, int part, Tile<T, kWide>& x,
                               Tile<T, kWide>& residual, const Affine& coefficients, RecordTile record_tile) {
#pragma unroll 1
  for (int tile = planes.tiles - 1; tile >= 0; --tile) {
    const auto load_next = [&](int u) {
      if (tile == 0) return;
      const OctetCoord coord = coord_of<T, kWide>(planes, part, tile - 1, u);
      if (kSingle && planes.shared(tile - 1))
        x.load_held(tile - 1, u);
      else if constexpr (kWide)
        x.load(p.x, planes.step, coord, u);
      if (kWide && p.residual) residual.load(p.residual, planes.step, coord, u);
    };
    const OctetCoords<T, kWide> coords(planes, part, tile);
    if constexpr (!kWide) {
      if (!kSingle || (tile + 1 < planes.tiles && !planes.shared(tile))) x.load(p.x, planes.step, coords);
      if (p.residual) residual.load(p.residual, planes.step, coords);
    }
    Tile<T, kWide> y;
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u) {
      write_octet(p, planes, coords.of[u], x, residual, coefficients, y, u);
      if constexpr (!kRecord) load_next(u);
    }
    if constexpr (kRecord) {
      record_tile(coords, y);
#pragma unroll
      for (int u = 0; u < kOctets<T>; ++u) load_next(u);
    }
  }
}

// Adds a tile of x and y to a record.
template <class T, bool kWide>
BNKERN_DEVICE void add_tile(ThreadRecord<ActivationSums>& record, const OctetCoords<T, kWide>& coords,
                            const Tile<T, kWide>& x, const Tile<T, kWide>& y, float centre) {
  ActivationSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (exists<T, kWide>(coords.of[u], j)) {
        addend.add_powers(x.octets[u][j] - centre);
        record.sums.add_rest(x.octets[u][j], y.octets[u][j] > 0);  // exact, so no partial sums for the tile are needed
      }
  if (!addend.finite()) {
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (exists<T, kWide>(coords.of[u], j)) record.sums.add_nonfinite(x.octets[u][j]);
  }
  record.add(addend);
}

// With kRecord, `parts` without data means that nothing is recorded.
template <class T, bool kMoments, bool kNormalize, bool kRecord, bool kWide>
__global__ void __launch_bounds__(kMostThreads, 1)
    planes_forward_kernel(Forward p, const __grid_constant__ Planes planes, Workspace space, RecordParts parts) {
  constexpr bool kSingle = kMoments && kNormalize;
  // The second launch visits blocks in reverse order, because the data that the first launch read last is in the cache.
  const unsigned block = kMoments ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int channel = static_cast<int>(planes.channel.divide(block)),
            part = static_cast<int>(block) - channel * planes.parts;
  const bool saves = !kSingle || part == 0;  // whether this block saves the statistics, if it joins the parts
  const bool cluster = kSingle && planes.parts > 1;
  select_channel<T>(p.x, channel);
  using Shared = Exchange<Moments<float>>;
  Shared* const shared = shared_memory<Shared>();

  Tile<T, kWide> x, residual;
  Affine coefficients{};
  const auto load_coefficients_and_residual = [&] {
    select_channel<T>(p.y, channel);
    select_channel(p.mask, planes, channel);
    select_channel<T>(p.residual, channel);
    if (kWide && p.residual)
      residual.load(p.residual, planes.step, OctetCoords<T, kWide>(planes, part, planes.tiles - 1));
    coefficients = affine(p, channel, 0, 1);
  };
  if constexpr (kMoments) {
    float pivot;
    const Moments<float> total = merge_block(moments_of_tiles<kSingle>(p, planes, part, x, pivot));
    if (threadIdx.x == 0) shared->part = {total.mean, total.m2};
    if (cluster) arrive_in_cluster();
    // Everything that does not depend on other blocks is loaded while the block waits.
    if constexpr (kNormalize) load_coefficients_and_residual();
    State state{};
    if (saves) state = read_state(p, channel);
    if constexpr (kSingle) {
      cluster ? wait_in_cluster() : __syncthreads();
    } else {
      if (threadIdx.x == 0) space.parts.at(part, channel) = shared->part;
      if (planes.parts > 1 && !last_of_blocks(space.arrivals + channel, planes.parts)) return;
    }
    if (threadIdx.x < 32) {
      const Moments<double> all = merge_parts<T>(planes, pivot, [&](int k) {
        if constexpr (!kSingle) return space.parts.at(k, channel);
        return cluster ? *of_cluster_block(&shared->part, k) : shared->part;
      });
      if (threadIdx.x == 0) {
        const Statistics s = statistics_of(p, planes.count, all);
        shared->result = {s.mean, s.spread};
        if (saves) save_statistics(p, channel, planes.count, all, s, state);
      }
    }
    __syncthreads();
    // The other blocks may exit once this one has read their parts. This block waits for them at its end.
    if (cluster) arrive_in_cluster_relaxed();
    if (saves) update_counter(p, space, state, channel, p.shape.c);
  } else {
    if constexpr (kWide) x.load(p.x, planes.step, OctetCoords<T, kWide>(planes, part, planes.tiles - 1));
    load_coefficients_and_residual();
    if (threadIdx.x == 0) {
      const Statistics s = given_statistics(p, channel);
      shared->result = {s.mean, s.spread};
      if (part == 0 && p.running_mean && p.mean) {
        static_cast<float*>(p.mean)[channel] = s.mean;
        static_cast<float*>(p.spread)[channel] = s.spread;
      }
    }
    __syncthreads();
  }
  if constexpr (kNormalize) {
    coefficients.mean = shared->result.first, coefficients.invstd = shared->result.second;
    if constexpr (kRecord) {
      // The mean of the batch if this call computes it, otherwise the pivot.
      const float centre = p.moments ? coefficients.mean : pivot_of<T>(p.x, p.shape);
      ThreadRecord<ActivationSums> record;
      const bool requested = parts.data != nullptr;
      write_tiles<kSingle, true>(p, planes, part, x, residual, coefficients,
                                 [&](const OctetCoords<T, kWide>& coords, const Tile<T, kWide>& y) {
                                   if (requested) add_tile(record, coords, x, y, centre);
                                 });
      if (requested) {
        record.publish(parts, part, channel);
        if (part == 0 && threadIdx.x == 0) parts.at(0, kCentre, channel) = centre;
      }
    } else {
      write_tiles<kSingle, false>(p, planes, part, x, residual, coefficients, 0);
    }
  }
  // A block must not exit while another block of the cluster may still read its shared memory.
  if (cluster) wait_in_cluster();
}

template <class T>
std::string forward(const CudaForward& p, std::uintptr_t stream) {
  const Forward& call = p.call;
  const PlanesPlan plan = plan_planes(call.shape, sizeof(T), 1, p.device, p.strategy, call.moments);
  const Planes planes = planes_of(call.shape, sizeof(T), plan, {call.x, call.residual, call.y});
  if (std::string reason = refused("planes", call.shape, call.dtype, plan); !reason.empty()) return reason;
  const Workspace space = lay_out(p.workspace, plan.parts, call.shape.c);
  Launch settings{"moments and normalize",
                  static_cast<unsigned>(plan.parts * call.shape.c),
                  static_cast<unsigned>(plan.threads),
                  shared_of(plan, plan.held, sizeof(T), 1),
                  stream,
                  static_cast<unsigned>(plan.parts)};
  const bool record = call.record && call.normalize, wide = is_wide<T>(planes);
  const RecordSpace records = record_space(call, p.workspace, plan.parts);
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.parts, stream) : error;
  };
  if (call.moments && call.normalize && plan.single && (wide || !record)) {
    std::string error;
    const auto kernel = !wide    ? planes_forward_kernel<T, true, true, false, false>
                        : record ? planes_forward_kernel<T, true, true, true, true>
                                 : planes_forward_kernel<T, true, true, false, true>;
    if (launch_clusters(settings, &error, kernel, call, planes, space, records.activation)) return with_record(error);
  }
  settings.shared_bytes = kReserved;
  settings.cluster = 1;
  if (call.moments) {
    settings.name = "moments";
    const auto kernel =
        wide ? planes_forward_kernel<T, true, false, false, true> : planes_forward_kernel<T, true, false, false, false>;
    std::string error = launch(settings, kernel, call, planes, space, RecordParts{});
    if (!error.empty() || !call.normalize) return error;
  }
  Forward second = call;
  if (call.moments) second.running_mean = {};  // normalize then uses the batch statistics that moments saved
  settings.name = "normalize";
  const auto kernel = !wide    ? planes_forward_kernel<T, false, true, true, false>
                      : record ? planes_forward_kernel<T, false, true, true, true>
                               : planes_forward_kernel<T, false, true, false, true>;
  return with_record(launch(settings, kernel, second, planes, space, records.activation));
}

}  // namespace

std::string planes_forward(const CudaForward& p, std::uintptr_t stream) {
  switch (p.call.dtype) {
    case DType::kBFloat16:
      return forward<BFloat16>(p, stream);
    case DType::kFloat16:
      return forward<Float16>(p, stream);
    default:
      return forward<float>(p, stream);
  }
}

WorkspaceSize planes_forward_workspace(const CudaForward& p) {
  const PlanesPlan plan =
      plan_planes(p.call.shape, p.call.dtype == DType::kFloat32 ? 4 : 2, 1, p.device, p.strategy, p.call.moments);
  return workspace_size(p.call.shape.c, plan.parts, p.call.shape.c, record_bytes(p.call, plan.parts));
}

}  // namespace bnkern
