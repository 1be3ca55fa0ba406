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

// A thread's octets of a tile of dy, and of x if it is needed.
template <class T>
struct Incoming {
  Tile<T> dy, x;
  unsigned bits[kOctets<T>] = {};  // the bits of the saved mask

  BNKERN_DEVICE void load(const Backward& p, const Planes& planes, bool with_x, int channel,
                          const OctetCoords<T>& coords) {
    dy.load(p.dy, channel, planes.step, coords);
    if (with_x) x.load(p.x, channel, planes.step, coords);
    load_bits(p, planes, channel, coords);
  }
  BNKERN_DEVICE void load_bits(const Backward& p, const Planes& planes, int channel, const OctetCoords<T>& coords) {
#pragma unroll
    for (int u = 0; u < kOctets<T>; ++u)
      if (p.act != Activation::none && p.mask && coords.of[u].elements)
        bits[u] = p.mask[mask_byte(planes, p.shape.c, channel, coords.of[u])];
  }
  BNKERN_DEVICE void keep(int tile) const {
    dy.keep(2 * tile);
    x.keep(2 * tile + 1);
  }
  BNKERN_DEVICE void find(int tile) {
    dy.find(2 * tile);
    x.find(2 * tile + 1);
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

template <class T>
BNKERN_DEVICE void add_tile(Pair& total, const Backward& p, const Incoming<T>& in, const OctetCoords<T>& coords,
                            const Affine& coefficients) {
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float xhat[8];
    const Octet<T> g = in.before_activation(p, u, coefficients, xhat);
    float sum[2] = {0, 0}, product[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      // g is 0 past the elements, but 0 * xhat is not 0 if xhat is Inf or NaN.
      if (j >= coords.of[u].elements) continue;
      sum[j % 2] += g[j];
      product[j % 2] = fma(g[j], xhat[j], product[j % 2]);
    }
    total.first += sum[0] + sum[1];
    total.second += product[0] + product[1];
  }
}

// Adds the summands of a tile to the record of the parameters' gradients.
template <class T>
BNKERN_DEVICE void add_tile(ThreadRecord<AffineSums>& record, const Backward& p, const Incoming<T>& in,
                            const OctetCoords<T>& coords, const Affine& coefficients) {
  AffineSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float xhat[8];
    const Octet<T> g = in.before_activation(p, u, coefficients, xhat);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < coords.of[u].elements) addend.add(g[j], xhat[j]);
  }
  record.add(addend);
}
// Adds a tile of dx, with its values as they are stored, to the record of dx.
template <class T>
BNKERN_DEVICE void add_tile(ThreadRecord<GradientSums>& record, const OctetCoords<T>& coords, const Tile<T>& dx) {
  GradientSums addend;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (j < coords.of[u].elements) addend.add(dx.octets[u][j]);
  record.add(addend);
}

template <class T>
BNKERN_DEVICE void write_tile(const Backward& p, const Planes& planes, int channel, const OctetCoords<T>& coords,
                              const Incoming<T>& in, const Affine& coefficients, const Centre& centre, Tile<T>& dx) {
  Tile<T> dresidual;
#pragma unroll
  for (int u = 0; u < kOctets<T>; ++u) {
    float xhat[8], d[8];
    dresidual.octets[u] = in.before_activation(p, u, coefficients, xhat);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float g = dresidual.octets[u][j];
      d[j] =
          p.training ? input_gradient(g, xhat[j], centre.mean_dy, centre.mean_dy_xhat, centre.scale) : g * centre.scale;
    }
    dx.octets[u] = Octet<T>::of(d);
  }
  if (p.dx) dx.store(p.dx, channel, planes.step, coords);
  if (p.dresidual) dresidual.store(p.dresidual, channel, planes.step, coords);
}

template <class T, bool kSums, bool kInput, bool kRecord>
__global__ void __launch_bounds__(kMostThreads)
    planes_backward_kernel(Backward p, Planes planes, Workspace space, RecordSpace records) {
  constexpr bool kSingle = kSums && kInput;
  // The second launch visits blocks in reverse order, because the data that the first launch read last is in the cache.
  const unsigned block = kSums ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  const int channel = static_cast<int>(block / planes.parts), part = static_cast<int>(block % planes.parts);
  using Shared = Exchange<Pair>;
  Shared* const shared = shared_memory<Shared>();
  const Affine coefficients = affine(p, channel, read(p.mean, channel, 0.0f), read(p.invstd, channel, 1.0f));
  const bool with_x = kSums || p.training || (p.act != Activation::none && !p.mask);

  Incoming<T> in;
  Pair sums{0, 0};
  if constexpr (kSums) {
    const auto add_tiles = [&](auto then) {
      for (int tile = 0; tile < planes.tiles; ++tile) {
        const OctetCoords<T> coords(planes, part, tile);
        in.load(p, planes, true, channel, coords);
        add_tile(sums, p, in, coords, coefficients);
        then(coords);
        if (kSingle && planes.shared(tile)) in.keep(tile);
      }
    };
    if constexpr (kRecord) {
      ThreadRecord<AffineSums> record;
      const bool wanted = records.affine.data != nullptr;
      add_tiles([&](const OctetCoords<T>& coords) {
        if (wanted) add_tile(record, p, in, coords, coefficients);
      });
      if (wanted) record.publish(records.affine, part, channel);
    } else {
      add_tiles([](const OctetCoords<T>&) {});
    }
    sums = merge_block(sums);
    if (threadIdx.x == 0) shared->part = sums;
    if constexpr (kSingle) {
      planes.parts > 1 ? cluster_barrier() : __syncthreads();
    } else {
      if (threadIdx.x == 0) space.parts.at(part, channel) = shared->part;
      if (planes.parts > 1 && !last_of_blocks(space.arrivals + channel, planes.parts)) return;
    }
    if (threadIdx.x < 32) {
      Pair mine{0, 0};
      for (int k = threadIdx.x; k < planes.parts; k += 32) {
        Pair one = shared->part;
        if constexpr (!kSingle) {
          one = space.parts.at(k, channel);
        } else if (planes.parts > 1) {
          one = *of_cluster_block(&shared->part, k);
        }
        mine.first += one.first;
        mine.second += one.second;
      }
      mine = merge_warp(mine);
      if (threadIdx.x == 0) {
        shared->result = mine;
        if (!kSingle || part == 0) save_sums(p, channel, {mine.first, mine.second});
      }
    }
    __syncthreads();
    sums = shared->result;
  } else if (p.training) {
    sums = {read(p.sum_dy, channel, 0.0f), read(p.sum_dy_xhat, channel, 0.0f)};
  }
  if constexpr (kInput) {
    const float count = static_cast<float>(p.shape.n * p.shape.s);
    const Centre centre{sums.first / count, sums.second / count, coefficients.weight * coefficients.invstd};
    const auto write_tiles = [&](auto then) {
      for (int tile = planes.tiles - 1; tile >= 0; --tile) {
        const OctetCoords<T> coords(planes, part, tile);
        if (kSingle && planes.shared(tile)) {
          in.find(tile);
          in.load_bits(p, planes, channel, coords);
        } else if (!kSingle || tile != planes.tiles - 1) {
          in.load(p, planes, with_x, channel, coords);
        }
        Tile<T> dx;
        write_tile(p, planes, channel, coords, in, coefficients, centre, dx);
        then(coords, dx);
      }
    };
    if constexpr (kRecord) {
      ThreadRecord<GradientSums> record;
      const bool wanted = records.gradient.data != nullptr;
      write_tiles([&](const OctetCoords<T>& coords, const Tile<T>& dx) {
        if (wanted) add_tile(record, coords, dx);
      });
      if (wanted) record.publish(records.gradient, part, channel);
    } else {
      write_tiles([](const OctetCoords<T>&, const Tile<T>&) {});
    }
  }
  // A block must not exit while another block of the cluster may still read its shared memory.
  if (kSingle && planes.parts > 1) cluster_barrier();
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
  const auto with_record = [&](std::string error) {
    return error.empty() && record ? fold_records(call, records, plan.parts, stream) : error;
  };
  if (call.sums && call.input && plan.single) {
    std::string error;
    const auto kernel =
        record ? planes_backward_kernel<T, true, true, true> : planes_backward_kernel<T, true, true, false>;
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
    const auto kernel =
        of_sums ? planes_backward_kernel<T, true, false, true> : planes_backward_kernel<T, true, false, false>;
    std::string error = launch(settings, kernel, second, planes, space, records);
    if (!error.empty() || !call.input) return with_record(error);
  }
  settings.name = "grad_input";
  const auto kernel =
      of_input ? planes_backward_kernel<T, false, true, true> : planes_backward_kernel<T, false, true, false>;
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
