// Planes are not served yet: their calls are refused.
#include "kernels.h"

namespace bnkern {

std::string planes_forward(const CudaForward&, std::uintptr_t) { return "forward: no kernels for planes"; }
std::string planes_backward(const CudaBackward&, std::uintptr_t) { return "backward: no kernels for planes"; }
std::int64_t planes_forward_workspace(const CudaForward&) { return 0; }
std::int64_t planes_backward_workspace(const CudaBackward&) { return 0; }

}  // namespace bnkern
