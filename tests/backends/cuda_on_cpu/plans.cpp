// The plans of the kernels, for test_plans.py.
#include "../../../csrc/cuda/planes.h"
#include "../../../csrc/cuda/rows.h"

namespace {
template <class T>
bnkern::RowsPlan rows_plan(const bnkern::Shape& shape, const bnkern::CudaDevice& device, int tensors, bool single) {
  const bool octets = shape.c % 8 == 0;
  return tensors == 1 ? bnkern::plan_rows<T, 1>(shape, device, octets, single)
                      : bnkern::plan_rows<T, 2>(shape, device, octets, single);
}
}  // namespace

extern "C" {
// Writes whether it is one launch, and the numbers of blocks, of threads of a block, of tiles of a thread, and of
// blocks that exchange parts. The first phase reads `tensors` tensors.
void plan(const bnkern::Shape* shape, const bnkern::CudaDevice* device, int itemsize, int tensors, bool single,
          std::int64_t* result) {
  using namespace bnkern;
  if (shape->rows) {
    const RowsPlan rows = itemsize == 4 ? rows_plan<float>(*shape, *device, tensors, single)
                                        : rows_plan<BFloat16>(*shape, *device, tensors, single);
    const std::int64_t values[] = {rows.single, std::int64_t{rows.splits} * rows.groups, rows.threads(), rows.tiles,
                                   rows.splits};
    std::copy(std::begin(values), std::end(values), result);
  } else {
    const Strategy strategy = single ? Strategy::kSingleRead : Strategy::kTwoKernels;
    const PlanesPlan planes = plan_planes(*shape, static_cast<std::size_t>(itemsize), tensors, *device, strategy, true);
    const std::int64_t values[] = {planes.single, planes.parts * shape->c, planes.threads, planes.tiles, planes.parts};
    std::copy(std::begin(values), std::end(values), result);
  }
}
}
