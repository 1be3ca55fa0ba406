// conv_norm_forward: a 3 x 3 convolution that normalises its input when it loads it, and computes the statistics of its
// output before it stores it. One block computes one image (conv_tile.h).
//
// The mean and M2 of an image are computed in two passes over its sums in registers, rounded to the storage type as
// they are stored: the mean, and then the squares of the distances from it. A thread adds up its pixels, xor shuffles
// those of the four lanes with its outputs, and one thread per channel those of the warps, each in a fixed order. The
// block that arrives last joins the parts of all images in their order. So the order of the blocks changes no bit.
#include <algorithm>
#include <utility>

#include "conv_tile.h"
#include "statistics.h"
#include "workspaces.h"

namespace bnkern {
namespace {

// The shared memory of a block. The image and the weights are no longer needed when the result is put together in the
// same place, and this is stored when the parts of all images are joined there.
template <int C>
struct ConvShared {
  Affine* coefficients;  // [C], of the norm of the input
  float* of_warps;       // [kPixelWarps, C]: sums of the warps
  float* means;          // [C], of the image
  char *image, *weights, *result;
  PivotSums* scratch;

  static constexpr int kBefore = C * (static_cast<int>(sizeof(Affine)) + 4 * ConvTile<C>::kPixelWarps + 4);
  static_assert(kBefore % 16 == 0);
  BNKERN_DEVICE explicit ConvShared(const ConvPlan& plan)
      : coefficients(shared_memory<Affine>()),
        of_warps(shared_memory<float>(C * sizeof(Affine))),
        means(of_warps + ConvTile<C>::kPixelWarps * C),
        image(shared_memory<char>(kBefore)),
        weights(image + plan.bordered() * ConvTile<C>::kStride),
        result(image),
        scratch(shared_memory<PivotSums>(kBefore)) {}
  static std::size_t bytes(const ConvPlan& plan) {
    const int operands = plan.bordered() * ConvTile<C>::kStride + ConvTile<C>::kWeightBytes;
    const int result = plan.pixels * ConvTile<C>::kResultStride;
    const int scratch = Chains::scratch(kConvThreads) * static_cast<int>(sizeof(PivotSums));
    return kBefore + std::max({operands, result, scratch});
  }
};

// ------------------------------------------------------------------------------------------------- the input

// Puts the image into shared memory: x itself, or y, which is stored if the call has a place for it. All loads of the
// image and the weights are issued before the first value is used.
template <class T, int C>
BNKERN_DEVICE void load_operands(const CudaConvNorm& p, const ConvPlan& plan, const ConvShared<C>& shared) {
  constexpr int kOctets = ConvTile<C>::kOctetsOfThread;
  const ConvOctets<C> own;
  const bool normalizes = p.input.mean != nullptr;
  Octet<T> x[kOctets], residual[kOctets];
  ConvWeights<C> weights;
  load_image<T, C>(x, p.input.x.data, plan, own);
  if (p.input.residual) load_image<T, C>(residual, p.input.residual.data, plan, own);
  if (plan.whole_words) weights.load(p.weight);
  const int c = static_cast<int>(threadIdx.x);
  if (normalizes && c < C) {
    const Statistics s = given_statistics(p.input, c);
    shared.coefficients[c] = affine(p.input, c, s.mean, s.spread);
  }
  clear_border<C>(shared.image, plan);
  if (plan.whole_words)
    weights.store(shared.weights);
  else
    copy_weights<T, C>(p, shared.weights);
  __syncthreads();
  Affine coefficients[8];
  if (normalizes) {
#pragma unroll
    for (int j = 0; j < 8; ++j) coefficients[j] = shared.coefficients[own.column * 8 + j];
  }
  const std::int64_t first = std::int64_t(blockIdx.x) * plan.pixels * ConvTile<C>::kOctets;
#pragma unroll
  for (int k = 0; k < kOctets; ++k) {
    if (own.pixel(k) >= plan.pixels) continue;
    if (normalizes) {
      unsigned bits = 0;
      x[k] = normalized_octet<T>(p.input, coefficients, x[k], residual[k], &bits);
      if (p.input.mask) p.input.mask[first + own.index(k)] = static_cast<std::uint8_t>(bits);
      if (p.input.y) x[k].store(static_cast<T*>(p.input.y.data) + (first + own.index(k)) * 8);
    }
    put_octet<T, C>(shared.image, plan, own, k, x[k]);
  }
  __syncthreads();
}

// ------------------------------------------------------------------------------------------------ the result

// The sums of a lane, rounded to the storage type. A word has the two outputs of a pixel.
template <class T, int C>
struct RoundedSums {
  std::uint32_t word[ConvTile<C>::kOutputTiles][ConvTile<C>::kPixelTiles][2];

  BNKERN_DEVICE explicit RoundedSums(const ConvSums<C>& sums) {
#pragma unroll
    for (int i = 0; i < ConvTile<C>::kOutputTiles; ++i)
#pragma unroll
      for (int j = 0; j < ConvTile<C>::kPixelTiles; ++j)
#pragma unroll
        for (int pixel = 0; pixel < 2; ++pixel)
          word[i][j][pixel] = pack_two(sums.value[i][j][pixel], sums.value[i][j][2 + pixel], static_cast<T*>(nullptr));
  }
  BNKERN_DEVICE float value(int i, int j, int pixel, int output) const {
    return widen(T{static_cast<std::uint16_t>(word[i][j][pixel] >> (output * 16))});
  }
};

// Computes, for each of a lane's outputs, the sum of add(value, i, output) over the pixels of the warp, and leaves it
// in `of_warps`.
template <class T, int C, class Add>
BNKERN_DEVICE void sum_over_pixels(const RoundedSums<T, C>& r, const ConvPlan& plan, const ConvCoord<C>& coord,
                                   float* of_warps, Add add) {
#pragma unroll
  for (int i = 0; i < ConvTile<C>::kOutputTiles; ++i) {
    float sum[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < ConvTile<C>::kPixelTiles; ++j)
#pragma unroll
      for (int pixel = 0; pixel < 2; ++pixel) {
        if (coord.pixel(j, pixel) >= plan.pixels) continue;
#pragma unroll
        for (int output = 0; output < 2; ++output) sum[output] += add(r.value(i, j, pixel, output), i, output);
      }
#pragma unroll
    for (int output = 0; output < 2; ++output) {
      sum[output] += __shfl_xor_sync(0xffffffffu, sum[output], 1);
      sum[output] += __shfl_xor_sync(0xffffffffu, sum[output], 2);
      if (coord.in_group == 0) of_warps[coord.pixel_warp * C + coord.output(i) + output] = sum[output];
    }
  }
}
// The sum of a channel over the warps.
template <int C>
BNKERN_DEVICE float sum_of_warps(const float* of_warps, int c) {
  float sum = of_warps[c];
#pragma unroll
  for (int warp = 1; warp < ConvTile<C>::kPixelWarps; ++warp) sum += of_warps[warp * C + c];
  return sum;
}

// Puts the result of the image together in shared memory. No thread may need the image any longer.
template <class T, int C>
BNKERN_DEVICE void put_result(const RoundedSums<T, C>& r, const ConvPlan& plan, const ConvCoord<C>& coord,
                              char* result) {
#pragma unroll
  for (int j = 0; j < ConvTile<C>::kPixelTiles; ++j)
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const int pixel = coord.pixel(j, which);
      if (pixel >= plan.pixels) continue;
#pragma unroll
      for (int i = 0; i < ConvTile<C>::kOutputTiles; ++i)
        *reinterpret_cast<std::uint32_t*>(result + pixel * ConvTile<C>::kResultStride + coord.output(i) * 2) =
            r.word[i][j][which];
    }
}
template <class T, int C>
BNKERN_DEVICE void store_result(const CudaConvNorm& p, const ConvPlan& plan, const char* result) {
  const ConvOctets<C> own;
  T* const image = static_cast<T*>(p.output.x.data) + std::int64_t(blockIdx.x) * plan.pixels * C;
#pragma unroll
  for (int k = 0; k < ConvTile<C>::kOctetsOfThread; ++k)
    if (own.pixel(k) < plan.pixels)
      store_words(image + own.index(k) * 8, *reinterpret_cast<const Words*>(
                                                result + own.pixel(k) * ConvTile<C>::kResultStride + own.column * 16));
}

// Joins the parts of all images and saves the statistics. The means of the parts are taken as distances from that of
// the first image, because a mean of half-precision values loses nothing in float32, but its square would.
template <int C>
BNKERN_DEVICE void join_images(const CudaConvNorm& p, const ConvPlan& plan, const Workspace& space, PivotSums* scratch,
                               const State& state) {
  const double pixels = plan.pixels;
  const auto origin_of = [&](int c) {
    const float mean = load_pair(space.parts.data + c).first;
    return mean - mean == 0 ? mean : 0.0f;  // distances from a mean that is not finite would all be NaN
  };
  const float origin = origin_of(plan.chains.channel());
  sum_over_block(
      plan.chains, static_cast<int>(p.output.shape.n), scratch,
      [&](int image, int c) { return load_pair(space.parts.data + std::int64_t(image) * C + c); },
      [&](int, Pair part) { return pivot_sums({pixels, part.first - double(origin), part.second}); },
      [&](int c, PivotSums sums) {
        Moments<double> all = moments_of(plan.all, sums);
        all.mean += origin_of(c);
        save_statistics(p.output, c, plan.all, all, statistics_of(p.output, plan.all, all), state);
      });
}

template <class T, int C>
__global__ void __launch_bounds__(kConvThreads, 1)
    conv_norm_forward_kernel(const __grid_constant__ CudaConvNorm p, const __grid_constant__ ConvPlan plan,
                             Workspace space) {
  const ConvShared<C> shared(plan);
  const ConvCoord<C> coord;
  const int c = static_cast<int>(threadIdx.x);  // a thread below C has a channel
  load_operands<T, C>(p, plan, shared);
  const RoundedSums<T, C> r(convolve<T, C>(shared.image, shared.weights, plan, coord));
  sum_over_pixels<T, C>(r, plan, coord, shared.of_warps, [](float value, int, int) { return value; });
  __syncthreads();
  if (c < C) shared.means[c] = sum_of_warps<C>(shared.of_warps, c) / static_cast<float>(plan.pixels);
  put_result<T, C>(r, plan, coord, shared.result);
  const int owned = plan.chains.owned();
  const State state = read_state(p.output, owned < 0 ? 0 : owned);
  __syncthreads();
  store_result<T, C>(p, plan, shared.result);
  float means[ConvTile<C>::kOutputTiles][2];
#pragma unroll
  for (int i = 0; i < ConvTile<C>::kOutputTiles; ++i)
#pragma unroll
    for (int output = 0; output < 2; ++output) means[i][output] = shared.means[coord.output(i) + output];
  sum_over_pixels<T, C>(r, plan, coord, shared.of_warps, [&](float value, int i, int output) {
    const float distance = value - means[i][output];
    return distance * distance;
  });
  __syncthreads();
  if (c < C) space.parts.at(blockIdx.x, c) = {shared.means[c], sum_of_warps<C>(shared.of_warps, c)};
  if (!last_of_blocks(space.arrivals, gridDim.x)) return;
  join_images<C>(p, plan, space, shared.scratch, state);
  update_counter(p.output, space, state, 0, 1);
}

// ------------------------------------------------------------------------------------------------ on the host

template <int C>
ConvPlan plan_of(const CudaConvNorm& p) {
  ConvPlan plan{};
  plan.h = static_cast<int>(p.h), plan.w = static_cast<int>(p.w), plan.pixels = plan.h * plan.w;
  plan.width = Divider::of(plan.w);
  const std::int64_t tiles = divide_up(plan.pixels, 8 * ConvTile<C>::kPixelWarps);
  plan.tiles = 1;
  while (plan.tiles < tiles) plan.tiles *= 2;
  plan.whole_words = p.weight_input == 1 && p.weight_w == C && p.weight_h == 3 * C && p.weight_output == 9 * C &&
                     reinterpret_cast<std::uintptr_t>(p.weight) % 16 == 0;
  plan.all = Count::of(p.output.shape.n * p.output.shape.s);
  plan.chains = Chains::of(C, kConvThreads);
  return plan;
}

template <int C>
std::string queue(const CudaConvNorm& p, std::uintptr_t stream) {
  const ConvPlan plan = plan_of<C>(p);
  const std::int64_t images = p.output.shape.n;
  const Launch settings{"conv_norm_forward", static_cast<unsigned>(images), kConvThreads, ConvShared<C>::bytes(plan),
                        stream};
  const bool bf16 = p.output.dtype == DType::kBFloat16;
  const auto kernel = bf16 ? conv_norm_forward_kernel<BFloat16, C> : conv_norm_forward_kernel<Float16, C>;
  return launch(settings, kernel, p, plan, lay_out(p.workspace, images, C));
}

// Calls f<C>() for the number of channels, one of 16, 32 and 64.
template <class F>
auto with_channels(const CudaConvNorm& p, F f) {
  switch (p.output.shape.c) {
    case 16:
      return f.template operator()<16>();
    case 32:
      return f.template operator()<32>();
    default:
      return f.template operator()<64>();
  }
}

}  // namespace

std::string conv_norm_refusal(const CudaConvNorm& p) {
  const Shape& shape = p.output.shape;
  if (p.output.dtype != DType::kBFloat16 && p.output.dtype != DType::kFloat16)
    return "conv_norm_forward: the CUDA kernel takes bfloat16 and float16";
  if (shape.c != 16 && shape.c != 32 && shape.c != 64)
    return "conv_norm_forward: the CUDA kernel takes 16, 32 or 64 channels, got " + std::to_string(shape.c);
  if (shape.s * shape.c > kConvValues)
    return "conv_norm_forward: the CUDA kernel takes images of at most " + std::to_string(kConvValues) +
           " values, got " + std::to_string(shape.s * shape.c);
  if (shape.n > 0x7fffffff)
    return "conv_norm_forward: the CUDA kernel takes less than 2^31 images, got " + std::to_string(shape.n);
  const std::size_t bytes = with_channels(p, [&]<int C>() { return ConvShared<C>::bytes(plan_of<C>(p)); });
  if (bytes > static_cast<std::size_t>(p.device.shared_bytes))
    return "conv_norm_forward: a block needs " + std::to_string(bytes) +
           " bytes of shared memory for an image, the device gives it " + std::to_string(p.device.shared_bytes);
  return {};
}

WorkspaceSize conv_norm_forward_workspace(const CudaConvNorm& p) {
  return workspace_size(1, p.output.shape.n, p.output.shape.c, 0);
}

std::string conv_norm_forward_within(const CudaConvNorm& p, std::uintptr_t stream) {
  const std::string reason = conv_norm_refusal(p);
  if (!reason.empty()) return reason;
  return with_channels(p, [&]<int C>() { return queue<C>(p, stream); });
}

std::string cuda_conv_norm_forward(CudaConvNorm p, std::uintptr_t stream) {
  return with_workspace("conv_norm_forward", stream, conv_norm_forward_workspace(p), [&](const CudaWorkspace& memory) {
    p.workspace = memory;
    return conv_norm_forward_within(p, stream);
  });
}

}  // namespace bnkern
