// The functions of the native module that only CUDA has.
#include "bind_cuda.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../call/cuda.h"
#include "kernels.h"
#include "workspaces.h"

namespace py = pybind11;

namespace bnkern {
namespace {

void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using Address = std::uintptr_t;
  const auto at = [](Address address) { return reinterpret_cast<void*>(address); };
  m.def(
      "cuda_device",
      [](int index, int multiprocessors, int shared_bytes, int threads, bool clusters, std::int64_t single_read_from) {
        know_cuda_device(index, {multiprocessors, shared_bytes, threads, clusters}, single_read_from);
      },
      py::arg("index"), py::kw_only(), py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("threads"),
      py::arg("clusters"), py::arg("single_read_from"),
      "What plans for the device of that index depend on (CudaDevice in csrc/cuda/kernels.h), and the least bytes of a "
      "tensor whose calls are one kernel. Before the first call.");
  m.def(
      "cuda_merge",
      [at](int dtype, Address count, Address mean, Address m2, Address merged_count, Address merged_mean,
           Address merged_m2, std::int64_t rows, std::int64_t channels, std::uintptr_t stream) {
        raise_if(cuda_merge({static_cast<DType>(dtype), at(count), at(mean), at(m2), at(merged_count), at(merged_mean),
                             at(merged_m2), rows, channels},
                            stream));
      },
      "merge on the current CUDA device; see CudaMerge in csrc/cuda/kernels.h.",
      py::call_guard<py::gil_scoped_release>());
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
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace bnkern
