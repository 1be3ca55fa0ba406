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
BNKERN_DEVICE float pivot_of(const View& x, const Shape& shape, int channel) {
  return middle_of([&](int k) {
    const std::int64_t n = k == 0 ? 0 : k == 1 ? shape.n / 2 : shape.n - 1;
    const std::int64_t s = k == 0 ? 0 : k == 1 ? shape.s / 2 : shape.s - 1;
    return widen(static_cast<const T*>(x.data)[n * x.outer + channel * x.inner + s]);
  });
}

// Computes the moments of the tile's values relative to `pivot`, and joins them to `total`.
template <class T>
BNKERN_DEVICE void add_tile(Moments<float>& total, const Tile<T>& tile, const OctetCoords<T>& coords, float pivot) {
  float sum = 0;
  int count = 0;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float d[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) d[j] = j < coords.of[u].elements ? tile.octets[u][j] - pivot : 0.0f;
    sum += ((d[0] + d[1]) + (d[2] + d[3])) + ((d[4] + d[5]) + (d[6] + d[7]));
    count += coords.of[u].elements;
  }
  if (count == 0) return;
  const float mean = sum / static_cast<float>(count);
  float squares[2] = {0, 0};
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float d = j < coords.of[u].elements ? (tile.octets[u][j] - pivot) - mean : 0.0f;
      squares[j % 2] = fma(d, d, squares[j % 2]);
    }
  total = chan_merge(total, Moments<float>{static_cast<float>(count), mean, squares[0] + squares[1]});
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
BNKERN_DEVICE Moments<double> merge_parts(const Forward& p, const Planes& planes, float pivot, F published) {
  Moments<float> mine{0, 0, 0};
  for (int part = threadIdx.x; part < planes.parts; part += 32) {
    const Pair one = published(part);
    mine = chan_merge(mine, Moments<float>{count_of<T>(planes, part), one.first, one.second});
  }
  mine = merge_warp(mine);
  return {static_cast<double>(p.shape.n * p.shape.s), static_cast<double>(pivot) + mine.mean, mine.m2};
}

// Writes y and the mask. `y` receives the values as they are stored.
template <class T>
BNKERN_DEVICE void normalize_tile(const Forward& p, const Planes& planes, int channel, const OctetCoords<T>& coords,
                                  const Tile<T>& x, const Affine& coefficients, Tile<T>& y) {
  Tile<T> residual;
  if (p.residual) residual.load(p.residual, channel, planes.step, coords);
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float z[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      z[j] = normalized(x.octets[u][j], coefficients);
      if (p.residual) z[j] += residual.octets[u][j];
    }
    y.octets[u] = Octet<T>::of(z);
    if (p.act == Activation::none) continue;
    const OctetCoord& coord = coords.of[u];
    const unsigned bits = activate(p.act, &y.octets[u]) & ((1u << coord.elements) - 1);
    if (p.mask && coord.elements)
      p.mask[mask_byte(planes, p.shape.c, channel, coord)] = static_cast<std::uint8_t>(bits);
  }
  y.store(p.y, channel, planes.step, coords);
}

// Adds a tile of x and y to a record.
template <class T>
BNKERN_DEVICE void add_tile(ThreadRecord<ActivationSums>& record, const OctetCoords<T>& coords, const Tile<T>& x,
                            const Tile<T>& y, float centre) {
  ActivationSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < coords.of[u].elements) {
        addend.add_powers(x.octets[u][j] - centre);
        record.sums.add_rest(x.octets[u][j], y.octets[u][j] > 0);  // exact, so no partial sums for the tile are needed
      }
  record.add(addend);
}

template <class T, bool kMoments, bool kNormalize, bool kRecord>
__global__ void __launch_bounds__(kMostThreads)
    planes_forward_kernel(Forward p, Planes planes, Workspace space, RecordParts parts) {
  constexpr bool kSingle = kMoments && kNormalize;
  // The second launch visits blocks in reverse order, because the data that the first launch read last is in the cache.
  const unsigned block = kMoments ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int channel = static_cast<int>(block / planes.parts), part = static_cast<int>(block % planes.parts);
  using Shared = Exchange<Moments<float>>;
  Shared* const shared = shared_memory<Shared>();

  Tile<T> x;
  float mean = 0, invstd = 1;
  if constexpr (kMoments) {
    const float pivot = pivot_of<T>(p.x, p.shape, channel);
    Moments<float> total{0, 0, 0};
    for (int tile = 0; tile < planes.tiles; ++tile) {
      const OctetCoords<T> coords(planes, part, tile);
      x.load(p.x, channel, planes.step, coords);
      add_tile(total, x, coords, pivot);
      if (kSingle && planes.shared(tile)) x.keep(tile);
    }
    total = merge_block(total);
    if (threadIdx.x == 0) shared->part = {total.mean, total.m2};
    bool joins = true;  // whether this block joins the parts
    if constexpr (kSingle) {
      planes.parts > 1 ? cluster_barrier() : __syncthreads();
    } else {
      if (threadIdx.x == 0) space.parts.at(part, channel) = shared->part;
      joins = planes.parts == 1 || last_of_blocks(space.arrivals + channel, planes.parts);
    }
    if (!joins) return;
    if (threadIdx.x < 32) {
      const Moments<double> all = merge_parts<T>(p, planes, pivot, [&](int k) {
        if constexpr (!kSingle) return space.parts.at(k, channel);
        return planes.parts == 1 ? shared->part : *of_cluster_block(&shared->part, k);
      });
      if (threadIdx.x == 0) {
        const Statistics s = statistics_of(p, all);
        shared->result = {s.mean, s.spread};
        if (!kSingle || part == 0) save_statistics(p, channel, all, s, momentum_of(p));
      }
    }
    __syncthreads();
    mean = shared->result.first, invstd = shared->result.second;
    if (!kSingle || part == 0) update_counter(p, space, channel, p.shape.c);
  } else {
    if (threadIdx.x == 0) {
      const Statistics s = given_statistics(p, channel);
      shared->result = {s.mean, s.spread};
      if (part == 0 && p.running_mean && p.mean) {
        static_cast<float*>(p.mean)[channel] = s.mean;
        static_cast<float*>(p.spread)[channel] = s.spread;
      }
    }
    __syncthreads();
    mean = shared->result.first, invstd = shared->result.second;
  }
  if constexpr (kNormalize) {
    const Affine coefficients = affine(p, channel, mean, invstd);
    const auto write_tiles = [&](auto then) {
      for (int tile = planes.tiles - 1; tile >= 0; --tile) {
        const OctetCoords<T> coords(planes, part, tile);
        if (kSingle && planes.shared(tile)) {
          x.find(tile);
        } else if (!kSingle || tile != planes.tiles - 1) {
          x.load(p.x, channel, planes.step, coords);
        }
        Tile<T> y;
        normalize_tile(p, planes, channel, coords, x, coefficients, y);
        then(coords, y);
      }
    };
    if constexpr (kRecord) {
      // The mean of the batch if this call computes it, otherwise the pivot.
      const float centre = p.moments ? mean : pivot_of<T>(p.x, p.shape, channel);
      ThreadRecord<ActivationSums> record;
      write_tiles([&](const OctetCoords<T>& coords, const Tile<T>& y) { add_tile(record, coords, x, y, centre); });
      record.publish(parts, part, channel);
      if (part == 0 && threadIdx.x == 0) parts.at(0, kCentre, channel) = centre;
    } else {
      write_tiles([](const OctetCoords<T>&, const Tile<T>&) {});
    }
  }
  // A block must not exit while another block of the cluster may still read its shared memory.
  if (kSingle && planes.parts > 1) cluster_barrier();
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
  const bool record = call.record && call.normalize;
  const RecordSpace records = record_space(call, p.workspace, plan.parts);
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.parts, stream) : error;
  };
  if (call.moments && call.normalize && plan.single) {
    std::string error;
    const auto kernel =
        record ? planes_forward_kernel<T, true, true, true> : planes_forward_kernel<T, true, true, false>;
    if (launch_clusters(settings, &error, kernel, call, planes, space, records.activation)) return with_record(error);
  }
  settings.shared_bytes = kReserved;
  settings.cluster = 1;
  if (call.moments) {
    settings.name = "moments";
    std::string error =
        launch(settings, planes_forward_kernel<T, true, false, false>, call, planes, space, RecordParts{});
    if (!error.empty() || !call.normalize) return error;
  }
  Forward second = call;
  if (call.moments) second.running_mean = {};  // normalize then uses the batch statistics that moments saved
  settings.name = "normalize";
  const auto kernel =
      record ? planes_forward_kernel<T, false, true, true> : planes_forward_kernel<T, false, true, false>;
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
