// The Python side of the native module: integers in (addresses, sizes, a dtype code, a stream),
// launch, error text out as RuntimeError. Nothing else: checks and allocation live in Python, but for the calls of
// every step, which call.cpp adds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "call.h"
#include "cpu/cpu.h"
#include "cpu/pool.h"
#include "cuda/bind_cuda.h"
#include "dlpack.h"
#include "layout.h"

namespace py = pybind11;

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

void* at(std::uintptr_t address) { return reinterpret_cast<void*>(address); }

// What this very file was compiled as; `python -m bnkern` shows it.
py::dict build_info() {
  py::dict info;
#ifdef __clang__
  info["compiler"] = "clang++ " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  info["isas"] = words(BNKERN_ISAS);
#ifdef BNKERN_CUDA
  info["cuda"] = BNKERN_CUDA;
  info["cuda_archs"] = words(BNKERN_CUDA_ARCHS);
#else
  info["cuda"] = py::none();
  info["cuda_archs"] = words("");
#endif
  return info;
}

using bnkern::ChannelVector;
using bnkern::DType;

ChannelVector channel_vector(std::uintptr_t address, int dtype) { return {at(address), static_cast<DType>(dtype)}; }

// A capsule that torch.from_dlpack turns into a tensor; where nobody does, the memory goes back with it.
py::capsule cpu_empty(int dtype, const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) {
  constexpr const char* kName = "dltensor_versioned";
  bnkern::dlpack::Managed* const managed = bnkern::dlpack::empty(
      bnkern::dlpack::kTypes[dtype], static_cast<std::int32_t>(shape.size()), shape.data(), strides.data());
  return py::capsule(managed, kName, [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, kName)) return;  // taken over: torch has renamed it
    auto* const managed = static_cast<bnkern::dlpack::Managed*>(PyCapsule_GetPointer(capsule, kName));
    managed->deleter(managed);
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "bnkern's compiled kernels: raw pointers in, nothing of torch.";
  if (!bnkern::add_calls(m.ptr())) throw py::error_already_set();
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA version or None, CUDA architectures.");
  m.def("isa", [] { return bnkern::cpu_kernels().isa; }, "The instruction set of the CPU kernels on this machine.");
  m.def("cpu_empty", &cpu_empty, py::arg("dtype"), py::arg("shape"), py::arg("strides"),
        "A DLPack capsule of uninitialised memory, a large one from the pool.");
  m.def(
      "dense_layout",
      [](const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) -> py::object {
        bnkern::Layout layout;
        if (!bnkern::dense_layout(static_cast<int>(shape.size()), shape.data(), strides.data(), layout))
          return py::none();
        const auto& [rows, n, c, s] = layout.shape;
        return py::make_tuple(rows, n, c, s, layout.outer, layout.inner);
      },
      "How forward and backward see a dense tensor: rows, N, C, S and two strides; None where they decline it.");
  m.def("pool_idle", &bnkern::pool_idle, "Bytes of freed results kept for the next ones.");
  m.def("pool_limit", &bnkern::pool_limit,
        "How many bytes may be kept: BNKERN_POOL_MB, or an eighth of memory (the container's, where it has less).");
  m.def("pool_clear", &bnkern::pool_clear, "Returns the kept bytes to the system.");
  // A tensor is an address and two strides, a channel vector an address and a dtype; address 0 is an absent one.
  m.def(
      "cpu_forward",
      [](int dtype, bool rows, std::int64_t n, std::int64_t c, std::int64_t s, bool moments, bool normalize, bool relu,
         std::uintptr_t x, std::int64_t x_outer, std::int64_t x_inner, std::uintptr_t residual,
         std::int64_t residual_outer, std::int64_t residual_inner, std::uintptr_t y, std::int64_t y_outer,
         std::int64_t y_inner, std::uintptr_t mask, std::uintptr_t weight, int weight_dtype, std::uintptr_t bias,
         int bias_dtype, std::uintptr_t mean, std::uintptr_t spread, std::uintptr_t running_mean,
         int running_mean_dtype, std::uintptr_t running_var, int running_var_dtype, std::uintptr_t counter,
         bool cumulative, double momentum, double eps, std::uintptr_t record, int threads) {
        bnkern::cpu_kernels().forward({
            .shape = {rows, n, c, s},
            .dtype = static_cast<DType>(dtype),
            .moments = moments,
            .normalize = normalize,
            .relu = relu,
            .x = {at(x), x_outer, x_inner},
            .residual = {at(residual), residual_outer, residual_inner},
            .y = {at(y), y_outer, y_inner},
            .mask = static_cast<std::uint8_t*>(at(mask)),
            .weight = channel_vector(weight, weight_dtype),
            .bias = channel_vector(bias, bias_dtype),
            .mean = at(mean),
            .spread = at(spread),
            .running_mean = channel_vector(running_mean, running_mean_dtype),
            .running_var = channel_vector(running_var, running_var_dtype),
            .counter = static_cast<std::int64_t*>(at(counter)),
            .cumulative = cumulative,
            .momentum = momentum,
            .eps = eps,
            .record = static_cast<double*>(at(record)),
            .threads = threads,
        });
      },
      "moments and/or normalize on the CPU; see Forward in csrc/params.h.", py::call_guard<py::gil_scoped_release>());
  m.def(
      "cpu_backward",
      [](int dtype, bool rows, std::int64_t n, std::int64_t c, std::int64_t s, bool sums, bool input, bool relu,
         bool training, std::uintptr_t dy, std::int64_t dy_outer, std::int64_t dy_inner, std::uintptr_t x,
         std::int64_t x_outer, std::int64_t x_inner, std::uintptr_t dx, std::int64_t dx_outer, std::int64_t dx_inner,
         std::uintptr_t dresidual, std::int64_t dresidual_outer, std::int64_t dresidual_inner, std::uintptr_t mask,
         std::uintptr_t weight, int weight_dtype, std::uintptr_t bias, int bias_dtype, std::uintptr_t mean,
         std::uintptr_t invstd, std::uintptr_t sum_dy, std::uintptr_t sum_dy_xhat, std::uintptr_t dweight,
         int dweight_dtype, std::uintptr_t dbias, int dbias_dtype, std::uintptr_t record_gradient,
         std::uintptr_t record_affine, int threads) {
        bnkern::cpu_kernels().backward({
            .shape = {rows, n, c, s},
            .dtype = static_cast<DType>(dtype),
            .sums = sums,
            .input = input,
            .relu = relu,
            .training = training,
            .dy = {at(dy), dy_outer, dy_inner},
            .x = {at(x), x_outer, x_inner},
            .dx = {at(dx), dx_outer, dx_inner},
            .dresidual = {at(dresidual), dresidual_outer, dresidual_inner},
            .mask = static_cast<const std::uint8_t*>(at(mask)),
            .weight = channel_vector(weight, weight_dtype),
            .bias = channel_vector(bias, bias_dtype),
            .mean = at(mean),
            .invstd = at(invstd),
            .sum_dy = at(sum_dy),
            .sum_dy_xhat = at(sum_dy_xhat),
            .dweight = channel_vector(dweight, dweight_dtype),
            .dbias = channel_vector(dbias, dbias_dtype),
            .record_gradient = static_cast<double*>(at(record_gradient)),
            .record_affine = static_cast<double*>(at(record_affine)),
            .threads = threads,
        });
      },
      "grad_sums and/or grad_input on the CPU; see Backward in csrc/params.h.",
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cpu_augment",
      [](int dtype, bool rows, bool random, std::uint64_t seed, std::uint32_t epoch, std::uintptr_t images,
         std::uintptr_t labels, std::uintptr_t chosen, std::int64_t count, std::uintptr_t table, std::uintptr_t out,
         std::uintptr_t labels_out, int threads) {
        bnkern::cpu_kernels().augment({
            .images = static_cast<const std::uint8_t*>(at(images)),
            .labels = static_cast<const std::int64_t*>(at(labels)),
            .chosen = static_cast<const std::int64_t*>(at(chosen)),
            .count = count,
            .table = at(table),
            .out = at(out),
            .labels_out = static_cast<std::int64_t*>(at(labels_out)),
            .dtype = static_cast<DType>(dtype),
            .rows = rows,
            .random = random,
            .seed = seed,
            .epoch = epoch,
            .threads = threads,
        });
      },
      "A batch of CIFAR images on the CPU; see Augment in csrc/params.h.", py::call_guard<py::gil_scoped_release>());

  // x and dy: address, sizes and strides, N, C, H, W; the kernel's, stride's and padding's pairs; results' addresses.
  m.def(
      "cpu_conv_grad_signs",
      [](int dtype, std::uintptr_t x, std::array<std::int64_t, 4> x_size, std::array<std::int64_t, 4> x_stride,
         std::uintptr_t dy, std::array<std::int64_t, 4> dy_size, std::array<std::int64_t, 4> dy_stride,
         std::array<std::int64_t, 2> kernel, std::array<std::int64_t, 2> stride, std::array<std::int64_t, 2> padding,
         std::array<std::uintptr_t, 4> results, bool winograd, int threads) {
        const auto image = [](std::uintptr_t data, const auto& size, const auto& stride) {
          return bnkern::Image{at(data),  size[0],   size[1],   size[2],  size[3],
                               stride[0], stride[1], stride[2], stride[3]};
        };
        bnkern::cpu_kernels().conv_grad_signs({
            .dtype = static_cast<DType>(dtype),
            .x = image(x, x_size, x_stride),
            .dy = image(dy, dy_size, dy_stride),
            .kernel_h = kernel[0],
            .kernel_w = kernel[1],
            .stride_h = stride[0],
            .stride_w = stride[1],
            .padding_h = padding[0],
            .padding_w = padding[1],
            .sum = at(results[0]),
            .abs_sum = at(results[1]),
            .sign_sum = static_cast<std::int32_t*>(at(results[2])),
            .nonzero = static_cast<std::int32_t*>(at(results[3])),
            .winograd = winograd,
            .threads = threads,
        });
      },
      "conv_grad_signs on the CPU; see ConvGradSigns in csrc/params.h.", py::call_guard<py::gil_scoped_release>());
  // x: address and sizes N, I, H, W; the weight's address, outputs and strides O, I, kernel rows and columns.
  m.def(
      "cpu_conv3x3",
      [](std::uintptr_t x, std::array<std::int64_t, 4> size, std::uintptr_t weight, std::int64_t outputs,
         std::array<std::int64_t, 4> weight_stride, std::uintptr_t y, int threads) {
        bnkern::cpu_kernels().conv3x3({
            .x = static_cast<const float*>(at(x)),
            .n = size[0],
            .inputs = size[1],
            .outputs = outputs,
            .h = size[2],
            .w = size[3],
            .weight = static_cast<const float*>(at(weight)),
            .weight_output = weight_stride[0],
            .weight_input = weight_stride[1],
            .weight_h = weight_stride[2],
            .weight_w = weight_stride[3],
            .y = static_cast<float*>(at(y)),
            .threads = threads,
        });
      },
      "conv3x3 on the CPU; see Conv3x3 in csrc/cpu/cpu.h.", py::call_guard<py::gil_scoped_release>());
#ifdef BNKERN_CUDA
  bnkern::bind_cuda(m);
#endif
}
