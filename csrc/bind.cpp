// The native module: information about the build, the memory pool, and the functions of csrc/call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "call/calls.h"
#include "call/layout.h"
#include "cpu/cpu.h"
#include "cpu/pool.h"
#ifdef BNKERN_CUDA
#include "call/cuda.h"
#include "cuda/workspaces.h"
#endif

namespace py = pybind11;

namespace {

std::vector<std::string> words(const char* text) {
  std::istringstream in(text);
  return {std::istream_iterator<std::string>(in), {}};
}

// The compiler, instruction sets and CUDA architectures of this build, for `python -m bnkern`.
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

}  // namespace

#ifdef BNKERN_CUDA
namespace {

void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

void add_cuda_functions(py::module_& m) {
  using bnkern::CudaWorkspace;
  using Address = std::uintptr_t;
  const auto pointer = [](Address address) { return reinterpret_cast<void*>(address); };
  m.def(
      "cuda_device",
      [](int index, int multiprocessors, int shared_bytes, int threads, std::array<int, 3> clusters,
         std::int64_t single_read_from) {
        bnkern::register_cuda_device(index, {multiprocessors, shared_bytes, threads, clusters}, single_read_from);
      },
      py::arg("index"), py::kw_only(), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("threads"),
      py::arg("clusters"), py::arg("single_read_from"),
      "Sets the properties of the device of that index on which plans depend (CudaDevice in csrc/cuda/kernels.h), and "
      "the least size in bytes of a tensor whose calls are one kernel. Call it before the first call of batch norm.");
  m.def(
      "cuda_clusters",
      [](int index, int shared_bytes) {
        std::array<int, 3> clusters{};
        raise_if(bnkern::count_clusters(index, shared_bytes, clusters));
        return clusters;
      },
      py::arg("index"), py::arg("shared_bytes"),
      "How many clusters of 2, 4 and 8 blocks of a device run at once (CudaDevice in csrc/cuda/kernels.h).");
  m.def(
      "cuda_merge",
      [pointer](int dtype, Address count, Address mean, Address m2, Address merged_count, Address merged_mean,
                Address merged_m2, std::int64_t rows, std::int64_t channels, std::uintptr_t stream) {
        raise_if(bnkern::cuda_merge({static_cast<bnkern::DType>(dtype), pointer(count), pointer(mean), pointer(m2),
                                     pointer(merged_count), pointer(merged_mean), pointer(merged_m2), rows, channels},
                                    stream));
      },
      "merge on the current CUDA device; see CudaMerge in csrc/cuda/kernels.h.",
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "cuda_workspace",
      [](std::uintptr_t stream) {
        CudaWorkspace result;
        raise_if(bnkern::with_workspace("cuda_workspace", stream, {0, 1}, [&](const CudaWorkspace& workspace) {
          result = workspace;
          return std::string();
        }));
        return std::array<std::int64_t, 3>{reinterpret_cast<std::int64_t>(result.data),
                                           bnkern::signal_bytes(result.size.groups), result.size.bytes};
      },
      "The address of a stream's workspace, the bytes of its signals, and the bytes behind them, to which tests write.",
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace
#else
namespace bnkern {
[[noreturn]] static void refuse() { throw std::runtime_error("the native module was built without CUDA"); }
void launch_cuda(Forward&, PyObject*, const dlpack::Device&) { refuse(); }
void launch_cuda(Backward&, PyObject*, const dlpack::Device&) { refuse(); }
void launch_cuda(Update&, PyObject*, const dlpack::Device&) { refuse(); }
void launch_cuda(CudaConvNorm&, PyObject*, const dlpack::Device&) { refuse(); }
std::string cuda_refusal(CudaConvNorm&, const dlpack::Device&) { return "the native module was built without CUDA"; }
}  // namespace bnkern
#endif

PYBIND11_MODULE(_native, m) {
  m.doc() = "bnkern's compiled kernels. They take torch's tensors, but do not link to a library of torch.";
  if (!bnkern::add_calls(m.ptr()) || !bnkern::add_cpu_functions(m.ptr()) || !bnkern::add_conv_norm(m.ptr()) ||
      !bnkern::add_update(m.ptr()))
    throw py::error_already_set();
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA version or None, CUDA architectures.");
  m.def("isa", [] { return bnkern::cpu_kernels().isa; }, "The instruction set of the CPU kernels on this machine.");
  m.def(
      "view_layout",
      [](const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides) -> py::object {
        bnkern::Layout layout;
        if (!bnkern::view_layout(static_cast<int>(shape.size()), shape.data(), strides.data(), layout))
          return py::none();
        const auto& [rows, n, c, s] = layout.shape;
        const bool keeps =
            bnkern::keeps_strides(static_cast<int>(shape.size()), shape.data(), strides.data(), layout.shape.rows);
        return py::make_tuple(rows, n, c, s, layout.outer, layout.inner, keeps);
      },
      "The layout in which kernels read a tensor: rows, N, C, S, two strides, and whether results have its own "
      "strides. "
      "None if two strides do not describe it.");
  m.def("pool_idle", &bnkern::pool_idle, "Bytes of freed results that are kept for new results.");
  m.def("pool_limit", &bnkern::pool_limit,
        "The largest number of bytes to keep: BNKERN_POOL_MB, or an eighth of the memory (of the container, if it has "
        "less).");
  m.def("pool_clear", &bnkern::pool_clear, "Returns the kept bytes to the system.");
#ifdef BNKERN_CUDA
  add_cuda_functions(m);
#endif
}
