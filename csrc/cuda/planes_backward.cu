// grad_sums and grad_input over planes: each alone, and both in one launch. The one launch reads the part of dy and x
// that fits on the chip only once.
//
// The sums are added first over a thread's octets in order, and then by trees over lanes, warps and parts. If both
// phases are one launch, the parts of a channel are a cluster, whose blocks read each other's partial results.
// Otherwise the last block of a channel to arrive adds up the parts. The order is the same, and so are the bits.
//
// Every CUDA build compiles this file, and the tests run it on the host.
#include "planes.h"

namespace bnkern {
namespace {

// The means that are subtracted from the gradient, and its scale.
struct Centre {
  float mean_dy, mean_dy_xhat, scale;
};

// A thread's octets of a tile of dy, of x if it is needed, and the bytes of the saved mask, which are loaded together.
template <class T, bool kWide>
struct Incoming {
  Tile<T, kWide> dy, x;
  unsigned bits[kOctets<T>] = {};

  BNKERN_DEVICE void load(const Backward& p, const Planes& planes, bool with_x, const OctetCoord& coord, int u) {
    dy.load(p.dy, planes.step, coord, u);
    if (with_x) x.load(p.x, planes.step, coord, u);
    load_bits(p, planes, coord, u);
  }
  BNKERN_DEVICE void load(const Backward& p, const Planes& planes, bool with_x, int part, int tile) {
    const OctetCoords<T, kWide> coords(planes, part, tile);
    dy.load(p.dy, planes.step, coords);
    if (with_x) x.load(p.x, planes.step, coords);
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u) load_bits(p, planes, coords.of[u], u);
  }
  BNKERN_DEVICE void load_bits(const Backward& p, const Planes& planes, const OctetCoord& coord, int u) {
    if (p.act != Activation::none && p.mask && coord.elements) bits[u] = p.mask[mask_byte(planes, coord)];
  }
  BNKERN_DEVICE void hold(int tile, int u) const {
    dy.hold(2 * tile, u);
    x.hold(2 * tile + 1, u);
  }
  BNKERN_DEVICE void load_held(int tile, int u) {
    dy.load_held(2 * tile, u);
    x.load_held(2 * tile + 1, u);
  }

  // Returns g, the gradient before the activation, and computes xhat.
  BNKERN_DEVICE Octet<T> before_activation(const Backward& p, int u, const Affine& coefficients,
                                           float (&xhat)[8]) const {
    Octet<T> g = dy.octets[u];
#pragma unroll
    for (int j = 0; j < 8; ++j) xhat[j] = standardize(x.octets[u][j], coefficients.mean, coefficients.invstd);
    if (p.act == Activation::none) return g;
    unsigned mask = bits[u];
    if (!p.mask) {
      float z[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) z[j] = scale_shift(xhat[j], coefficients.weight, coefficients.bias);
      const auto stored = Octet<T>::of(z);
      mask = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) mask |= unsigned(positive(stored[j])) << j;
    }
    activate_gradient(p.act, &g, mask);
    return g;
  }
};

template <class T, bool kWide>
BNKERN_DEVICE void add_octet(Pair& total, const Backward& p, const Incoming<T, kWide>& in, const OctetCoord& coord,
                             const Affine& coefficients, int u) {
  float xhat[8];
  const Octet<T> g = in.before_activation(p, u, coefficients, xhat);
  float sum[2] = {0, 0}, product[2] = {0, 0};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    // g is 0 past the elements, but 0 * xhat is not 0 if xhat is Inf or NaN.
    if (!exists<T, kWide>(coord, j)) continue;
    sum[j % 2] += g[j];
    product[j % 2] = fma(g[j], xhat[j], product[j % 2]);
  }
  total.first += sum[0] + sum[1];
  total.second += product[0] + product[1];
}

// Adds the summands of a tile to the record of the parameters' gradients.
template <class T, bool kWide>
BNKERN_DEVICE void add_tile(ThreadRecord<AffineSums>& record, const Backward& p, const Incoming<T, kWide>& in,
                            const OctetCoords<T, kWide>& coords, const Affine& coefficients) {
  AffineSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float xhat[8];
    const Octet<T> g = in.before_activation(p, u, coefficients, xhat);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (exists<T, kWide>(coords.of[u], j)) addend.add(g[j], xhat[j]);
  }
  record.add(addend);
}
// Adds a tile of dx, with its values as they are stored, to the record of dx.
template <class T, bool kWide>
BNKERN_DEVICE void add_tile(ThreadRecord<GradientSums>& record, const OctetCoords<T, kWide>& coords,
                            const Tile<T, kWide>& dx) {
  GradientSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (exists<T, kWide>(coords.of[u], j)) addend.add(dx.octets[u][j]);
  if (!addend.finite()) {
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (exists<T, kWide>(coords.of[u], j)) record.sums.add_nonfinite(dx.octets[u][j]);
  }
  record.add(addend);
}

// Computes the sums of a thread's tiles. In a wide kernel the loads of the first tile to `in` have been issued before.
// Afterwards `in` is the last tile, and shared memory has the tiles that are held. An octet of the next tile is loaded
// as soon as the one before it in the same registers is added. For a record, record_tile(coords) adds a tile.
template <bool kSingle, bool kRecord, class T, bool kWide, class RecordTile>
BNKERN_DEVICE Pair sums_of_tiles(const Backward& p, const Planes& planes, int part, Incoming<T, kWide>& in,
                                 const Affine& coefficients, RecordTile record_tile) {
  Pair sums{0, 0};
#pragma unroll 1
  for (int tile = 0; tile < planes.tiles; ++tile) {
    const auto hold_and_load_next = [&](int u) {
      if (tile + 1 == planes.tiles) return;
      if (kSingle && planes.shared(tile)) in.hold(tile, u);
      if constexpr (kWide) in.load(p, planes, true, coord_of<T, kWide>(planes, part, tile + 1, u), u);
    };
    if constexpr (!kWide) in.load(p, planes, true, part, tile);
    const OctetCoords<T, kWide> coords(planes, part, tile);
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u) {
      add_octet(sums, p, in, coords.of[u], coefficients, u);
      if constexpr (!kRecord) hold_and_load_next(u);
    }
    if constexpr (kRecord) {
      record_tile(coords);
#pragma unroll
      for (int u = 0; u < kOctets<T>; ++u) hold_and_load_next(u);
    }
  }
  return sums;
}

// Computes and writes octet u of dx and of the residual's gradient. `dx` receives the values as they are stored.
template <class T, bool kWide>
BNKERN_DEVICE void write_octet(const Backward& p, const Planes& planes, const OctetCoord& coord,
                               const Incoming<T, kWide>& in, const Affine& coefficients, const Centre& centre,
                               Tile<T, kWide>& dx, int u) {
  Tile<T, kWide> dresidual;
  float xhat[8], d[8];
  dresidual.octets[u] = in.before_activation(p, u, coefficients, xhat);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float g = dresidual.octets[u][j];
    d[j] =
        p.training ? input_gradient(g, xhat[j], centre.mean_dy, centre.mean_dy_xhat, centre.scale) : g * centre.scale;
  }
  dx.octets[u] = Octet<T>::of(d);
  if (p.dx) dx.store(p.dx, planes.step, coord, u);
  if (p.dresidual) dresidual.store(p.dresidual, planes.step, coord, u);
}

// Writes the results of all tiles, from the last to the first. `in` is the last tile in a wide kernel, and in one of
// both phases. An octet of the next tile is loaded as soon as the one before it in the same registers is written. For a
// record, record_tile(coords, dx) adds a tile.
template <bool kSingle, bool kRecord, class T, bool kWide, class RecordTile>
BNKERN_DEVICE void write_tiles(const Backward& p, const Planes& planes, bool with_x, int part, Incoming<T, kWide>& in,
                               const Affine& coefficients, const Centre& centre, RecordTile record_tile) {
#pragma unroll 1
  for (int tile = planes.tiles - 1; tile >= 0; --tile) {
    const auto load_next = [&](int u) {
      if (tile == 0) return;
      const OctetCoord coord = coord_of<T, kWide>(planes, part, tile - 1, u);
      if (kSingle && planes.shared(tile - 1)) {
        in.load_held(tile - 1, u);
        in.load_bits(p, planes, coord, u);
      } else if constexpr (kWide) {
        in.load(p, planes, with_x, coord, u);
      }
    };
    if constexpr (!kWide)
      if (!kSingle || (tile + 1 < planes.tiles && !planes.shared(tile))) in.load(p, planes, with_x, part, tile);
    const OctetCoords<T, kWide> coords(planes, part, tile);
    Tile<T, kWide> dx;
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u) {
      write_octet(p, planes, coords.of[u], in, coefficients, centre, dx, u);
      if constexpr (!kRecord) load_next(u);
    }
    if constexpr (kRecord) {
      record_tile(coords, dx);
#pragma unroll
      for (int u = 0; u < kOctets<T>; ++u) load_next(u);
    }
  }
}

// With kRecord, parts without data mean that the call does not request this record.
template <class T, bool kSums, bool kInput, bool kRecord, bool kWide>
__global__ void __launch_bounds__(kMostThreads, 1)
    planes_backward_kernel(Backward p, const __grid_constant__ Planes planes, Workspace space, RecordSpace records) {
  constexpr bool kSingle = kSums && kInput;
  // The second launch visits blocks in reverse order, because the data that the first launch read last is in the cache.
  const unsigned block = kSums ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int channel = static_cast<int>(planes.channel.divide(block));
  const int part = static_cast<int>(block) - channel * planes.parts;
  const bool cluster = kSingle && planes.parts > 1;
  select_channel<T>(p.dy, channel);
  select_channel<T>(p.x, channel);
  select_channel(p.mask, planes, channel);
  using Shared = Exchange<Pair>;
  Shared* const shared = shared_memory<Shared>();
  const bool with_x = kSums || p.training || (p.act != Activation::none && !p.mask);

  Incoming<T, kWide> in;
  if constexpr (kWide) in.load(p, planes, with_x, part, kSums ? 0 : planes.tiles - 1);
  const Affine coefficients = affine(p, channel, read(p.mean, channel, 0.0f), read(p.invstd, channel, 1.0f));
  Pair sums{0, 0};
  if constexpr (kSums) {
    if constexpr (kRecord) {
      ThreadRecord<AffineSums> record;
      const bool requested = records.affine.data != nullptr;
      sums = sums_of_tiles<kSingle, true>(p, planes, part, in, coefficients, [&](const OctetCoords<T, kWide>& coords) {
        if (requested) add_tile(record, p, in, coords, coefficients);
      });
      if (requested) record.publish(records.affine, part, channel);
    } else {
      sums = sums_of_tiles<kSingle, false>(p, planes, part, in, coefficients, 0);
    }
    sums = merge_block(sums);
    if (threadIdx.x == 0) shared->part = sums;
    if constexpr (kSingle) {
      if (cluster) {
        arrive_in_cluster();
        wait_in_cluster();
      } else {
        __syncthreads();
      }
    } else {
      if (threadIdx.x == 0) space.parts.at(part, channel) = shared->part;
      if (planes.parts > 1 && !last_of_blocks(space.arrivals + channel, planes.parts)) return;
    }
    if (threadIdx.x < 32) {
      Pair total{0, 0};
      for (int k = threadIdx.x; k < planes.parts; k += 32) {
        Pair sums_of_part = shared->part;
        if constexpr (!kSingle) {
          sums_of_part = space.parts.at(k, channel);
        } else if (cluster) {
          sums_of_part = *of_cluster_block(&shared->part, k);
        }
        total = merged(total, sums_of_part);
      }
      total = merge_warp(total);
      if (threadIdx.x == 0) {
        shared->result = total;
        if (!kSingle || part == 0) save_sums(p, channel, {total.first, total.second});
      }
    }
    __syncthreads();
    // The other blocks may exit once this one has read their parts. This block waits for them at its end.
    if (cluster) arrive_in_cluster_relaxed();
    sums = shared->result;
  } else if (p.training) {
    sums = {read(p.sum_dy, channel, 0.0f), read(p.sum_dy_xhat, channel, 0.0f)};
  }
  if constexpr (kInput) {
    select_channel<T>(p.dx, channel);
    select_channel<T>(p.dresidual, channel);
    const Pair means = means_of(planes.count, {sums.first, sums.second});
    const Centre centre{means.first, means.second, coefficients.weight * coefficients.invstd};
    if constexpr (kRecord) {
      ThreadRecord<GradientSums> record;
      const bool requested = records.gradient.data != nullptr;
      write_tiles<kSingle, true>(p, planes, with_x, part, in, coefficients, centre,
                                 [&](const OctetCoords<T, kWide>& coords, const Tile<T, kWide>& dx) {
                                   if (requested) add_tile(record, coords, dx);
                                 });
      if (requested) record.publish(records.gradient, part, channel);
    } else {
      write_tiles<kSingle, false>(p, planes, with_x, part, in, coefficients, centre, 0);
    }
  }
  // A block must not exit while another block of the cluster may still read its shared memory.
  if (cluster) wait_in_cluster();
}

template <class T>
std::string backward(const CudaBackward& p, std::uintptr_t stream) {
  const Backward& call = p.call;
  const PlanesPlan plan = plan_planes(call.shape, sizeof(T), 2, p.device, p.strategy, call.sums);
  const Planes planes = planes_of(call.shape, sizeof(T), plan, {call.dy, call.x, call.dx, call.dresidual});
  if (std::string reason = refused("planes", call.shape, call.dtype, plan); !reason.empty()) return reason;
  const Workspace space = lay_out(p.workspace, plan.parts, call.shape.c);
  Launch settings{"grad_sums and grad_input",
                  static_cast<unsigned>(plan.parts * call.shape.c),
                  static_cast<unsigned>(plan.threads),
                  shared_of(plan, plan.held, sizeof(T), 2),
                  stream,
                  static_cast<unsigned>(plan.parts)};
  const RecordSpace records = record_space(call, p.workspace, plan.parts);
  const bool of_sums = records_affine(call), of_input = records_gradient(call), record = of_sums || of_input;
  const bool wide = is_wide<T>(planes);
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.parts, stream) : error;
  };
  if (call.sums && call.input && plan.single && (wide || !record)) {
    std::string error;
    const auto kernel = !wide    ? planes_backward_kernel<T, true, true, false, false>
                        : record ? planes_backward_kernel<T, true, true, true, true>
                                 : planes_backward_kernel<T, true, true, false, true>;
    if (launch_clusters(settings, &error, kernel, call, planes, space, records)) return with_record(error);
  }
  settings.shared_bytes = kReserved;
  settings.cluster = 1;
  Backward second = call;
  if (call.sums) {
    if (!second.sum_dy) {  // the sums are stored in the workspace, behind the parts
      second.sum_dy = space.totals;
      second.sum_dy_xhat = reinterpret_cast<float*>(space.totals) + call.shape.c;
    }
    settings.name = "grad_sums";
    const auto kernel = !wide     ? planes_backward_kernel<T, true, false, true, false>
                        : of_sums ? planes_backward_kernel<T, true, false, true, true>
                                  : planes_backward_kernel<T, true, false, false, true>;
    std::string error = launch(settings, kernel, second, planes, space, records);
    if (!error.empty() || !call.input) return with_record(error);
  }
  settings.name = "grad_input";
  const auto kernel = !wide      ? planes_backward_kernel<T, false, true, true, false>
                      : of_input ? planes_backward_kernel<T, false, true, true, true>
                                 : planes_backward_kernel<T, false, true, false, true>;
  return with_record(launch(settings, kernel, second, planes, space, records));
}

}  // namespace

std::string planes_backward(const CudaBackward& p, std::uintptr_t stream) {
  switch (p.call.dtype) {
    case DType::kBFloat16:
      return backward<BFloat16>(p, stream);
    case DType::kFloat16:
      return backward<Float16>(p, stream);
    default:
      return backward<float>(p, stream);
  }
}

WorkspaceSize planes_backward_workspace(const CudaBackward& p) {
  const PlanesPlan plan =
      plan_planes(p.call.shape, p.call.dtype == DType::kFloat32 ? 4 : 2, 2, p.device, p.strategy, p.call.sums);
  return workspace_size(p.call.shape.c, plan.parts, p.call.shape.c, record_bytes(p.call, plan.parts));
}

}  // namespace bnkern
