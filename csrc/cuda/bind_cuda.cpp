// Integers in (addresses, sizes, a dtype code, a stream), launch, error text out as RuntimeError, as in bind.cpp.
#include "bind_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "workspaces.h"

namespace py = pybind11;

namespace bnkern {
namespace {

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

using Address = std::uintptr_t;
using Addressed = std::array<std::int64_t, 3>;  // address, outer, inner
using Vector = std::array<std::int64_t, 2>;     // address, dtype
using Sizes = std::array<std::int64_t, 4>;      // rows, n, c, s
using Limits = std::array<int, 4>;              // multiprocessors, shared_bytes, threads, clusters

View view(const Addressed& v) { return {at(v[0]), v[1], v[2]}; }
ChannelVector vector(const Vector& v) { return {at(v[0]), static_cast<DType>(v[1])}; }
Shape shape(const Sizes& v) { return {v[0] != 0, v[1], v[2], v[3]}; }
CudaDevice device(const Limits& v) { return {v[0], v[1], v[2], v[3] != 0}; }

CudaForward forward(int dtype, const Sizes& sizes, bool moments, bool normalize, bool relu, const Addressed& x,
                    const Addressed& residual, const Addressed& y, Address mask, const Vector& weight,
                    const Vector& bias, Address mean, Address spread, const Vector& running_mean,
                    const Vector& running_var, Address counter, bool cumulative, double momentum, double eps,
                    Address record, const Limits& limits, int strategy) {
  return {
      .call =
          {
              .shape = shape(sizes),
              .dtype = static_cast<DType>(dtype),
              .moments = moments,
              .normalize = normalize,
              .relu = relu,
              .x = view(x),
              .residual = view(residual),
              .y = view(y),
              .mask = static_cast<std::uint8_t*>(at(mask)),
              .weight = vector(weight),
              .bias = vector(bias),
              .mean = at(mean),
              .spread = at(spread),
              .running_mean = vector(running_mean),
              .running_var = vector(running_var),
              .counter = static_cast<std::int64_t*>(at(counter)),
              .cumulative = cumulative,
              .momentum = momentum,
              .eps = eps,
              .record = static_cast<double*>(at(record)),
              .threads = 0,
          },
      .device = device(limits),
      .strategy = static_cast<Strategy>(strategy),
      .workspace = {},
  };
}

CudaBackward backward(int dtype, const Sizes& sizes, bool sums, bool input, bool relu, bool training,
                      const Addressed& dy, const Addressed& x, const Addressed& dx, const Addressed& dresidual,
                      Address mask, const Vector& weight, const Vector& bias, Address mean, Address invstd,
                      Address sum_dy, Address sum_dy_xhat, const Vector& dweight, const Vector& dbias,
                      Address record_gradient, Address record_affine, const Limits& limits, int strategy) {
  return {
      .call =
          {
              .shape = shape(sizes),
              .dtype = static_cast<DType>(dtype),
              .sums = sums,
              .input = input,
              .relu = relu,
              .training = training,
              .dy = view(dy),
              .x = view(x),
              .dx = view(dx),
              .dresidual = view(dresidual),
              .mask = static_cast<const std::uint8_t*>(at(mask)),
              .weight = vector(weight),
              .bias = vector(bias),
              .mean = at(mean),
              .invstd = at(invstd),
              .sum_dy = at(sum_dy),
              .sum_dy_xhat = at(sum_dy_xhat),
              .dweight = vector(dweight),
              .dbias = vector(dbias),
              .record_gradient = static_cast<double*>(at(record_gradient)),
              .record_affine = static_cast<double*>(at(record_affine)),
              .threads = 0,
          },
      .device = device(limits),
      .strategy = static_cast<Strategy>(strategy),
      .workspace = {},
  };
}

// A launch of a call made from Args.
template <class Call, class... Args>
auto launcher(Call (*make)(Args...), std::string (*queue)(Call, std::uintptr_t)) {
  return [=](Args... args, std::uintptr_t stream) { raise_if(queue(make(args...), stream)); };
}

}  // namespace

void bind_cuda(py::module_& m) {
  // Other threads run meanwhile, since a launch waits where the stream's queue is full or CUDA loads a kernel. What
  // must not interleave is kept apart by a lock for each stream (workspaces.h), with or without a GIL.
  const py::call_guard<py::gil_scoped_release> released;
  m.def(
      "cuda_merge",
      [](int dtype, Address count, Address mean, Address m2, Address merged_count, Address merged_mean,
         Address merged_m2, std::int64_t rows, std::int64_t channels, std::uintptr_t stream) {
        raise_if(cuda_merge({static_cast<DType>(dtype), at(count), at(mean), at(m2), at(merged_count), at(merged_mean),
                             at(merged_m2), rows, channels},
                            stream));
      },
      "merge on the current CUDA device; see CudaMerge in csrc/cuda/kernels.h.", released);
  m.def(
      "cuda_forward", launcher(forward, cuda_forward),
      "moments and/or normalize on the current CUDA device; see Forward in csrc/params.h. MemoryError where the device "
      "has no memory left for the stream's workspace.",
      released);
  m.def("cuda_backward", launcher(backward, cuda_backward),
        "grad_sums and/or grad_input on the current CUDA device; see Backward in csrc/params.h. Raises likewise.",
        released);
  m.def(
      "cuda_workspace",
      [](std::uintptr_t stream) {
        CudaWorkspace found;
        raise_if(with_workspace("cuda_workspace", stream, {0, 1}, [&](const CudaWorkspace& workspace) {
          found = workspace;
          return std::string();
        }));
        return std::array<std::int64_t, 3>{reinterpret_cast<std::int64_t>(found.data), signal_bytes(found.size.groups),
                                           found.size.bytes};
      },
      "Address of a stream's workspace, bytes of its signals, bytes behind them: for tests, which write to the latter.",
      released);
}

}  // namespace bnkern
